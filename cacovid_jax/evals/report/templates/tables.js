"use strict";

// Parts of the page that need a script show only where there is one.
for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
const data = JSON.parse(document.getElementById("data").textContent);

/** Returns a new element with attributes and children, all of it as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Returns a ratio in per cent, as the page writes it. */
function percent(ratio) {
  return `${Number((100 * ratio).toPrecision(6))} %`;
}

// Headings sort the last body of their table; what cannot be run stays last.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const numeric = heading.dataset.sort === "number";
    const button = make("button", { type: "button" }, ...heading.childNodes);
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      // Numbers begin with the best, names with the first.
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const again = heading.getAttribute("aria-sort") === first;
      for (const each of headings) each.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", again ? other : first);
      sortRows(table.tBodies[table.tBodies.length - 1], column, numeric,
        (again ? other : first) === "ascending" ? 1 : -1);
    });
  });
}

function sortRows(body, column, numeric, sign) {
  const value = (row) => row.cells[column].dataset.value ?? "";
  const compare = (a, b) =>
    (a === "") - (b === "") ||
    sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...body.rows];
  rows.sort((a, b) => compare(value(a), value(b)));
  body.append(...rows);
}

// One ratio alone, in the table and among the differences.
const columns = document.getElementById("columns");
if (columns) {
  columns.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-column]")) {
      part.hidden = columns.value !== "" && part.dataset.column !== columns.value;
    }
  });
}
