{
  // A method against vanilla, in the groups of one facet.
  const bars = document.getElementById("bars");
  const choices = ["facet", "bars-method", "bars-ratio"].map((id) =>
    document.getElementById(id));

  const measure = (kind, label, value) => {
    const fill = make("i");
    const known = value !== null && value !== undefined;
    fill.style.width = `${known ? 100 * value : 0}%`;
    const text = known ? (100 * value).toFixed(1) : "–";
    return make("div", { class: `measure ${kind}`, title: `${label} ${text}` },
      make("span", { class: "track" }, fill), make("b", {}, text));
  };

  const draw = () => {
    const [facetChoice, method, ratio] = choices.map((choice) => choice.value);
    const place = Number(facetChoice);
    const facet = data.groups.facets[place];
    const cell = data.groups.values[method]?.[ratio];
    const rows = facet.names.map((name, i) => make("div", { class: "bars-row" },
      make("span", { class: "name" }, name,
        make("span", { class: "small" }, `n = ${facet.counts[i]}`)),
      make("span", { class: "pair" },
        measure("", method, cell ? cell[place][i] : null),
        measure("whole", "vanilla", data.groups.vanilla[place][i]))));
    const note = cell ? `${method} at ${percent(ratio)} above, vanilla below`
      : `${method} could not be run at ${percent(ratio)}; vanilla alone`;
    bars.replaceChildren(make("p", { class: "note" }, note), ...rows);
    const words = facet.names.map((name, i) => {
      const value = cell?.[place][i];
      return `${name} ${value == null ? "unknown" : (100 * value).toFixed(1)}`;
    });
    bars.setAttribute("aria-label",
      `${note}, by ${facet.title}: ${words.join(", ")}`);
    for (const table of document.querySelectorAll("details.facet")) {
      table.hidden = table.dataset.facet !== facetChoice;
    }
  };

  if (bars) {
    for (const table of document.querySelectorAll("details.facet")) {
      table.open = false;
    }
    for (const choice of choices) choice.addEventListener("change", draw);
    draw();
  }
}
