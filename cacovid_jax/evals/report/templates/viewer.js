{
  // The clip viewer: one article at a time, its tokens by method and ratio.
  const viewer = document.getElementById("viewer");
  const RAMP = [[247, 245, 240], [191, 214, 230], [72, 138, 190], [8, 48, 107]];

  /** Returns the bytes of a base64 text. */
  const bytes = (text) =>
    Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

  /** Returns the tokens of one frame in a bit mask, lowest bit first. */
  const tokensOf = (mask, first, count) => {
    const found = [];
    for (let i = 0; mask && i < count; i++) {
      const token = first + i;
      if ((mask[token >> 3] >> (token & 7)) & 1) found.push(i);
    }
    return found;
  };

  /** Returns path data of a unit square for each token. */
  const squares = (tokens, width) => tokens
    .map((i) => `M${i % width} ${Math.floor(i / width)}h1v1h-1z`).join("");

  /** Colours a canvas of a pixel per token by scores of a byte each. */
  const paint = (canvas, scores) => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    scores.forEach((score, i) => {
      const place = (score / 255) * (RAMP.length - 1);
      const lower = Math.min(Math.floor(place), RAMP.length - 2);
      for (let c = 0; c < 3; c++) {
        const [a, b] = [RAMP[lower][c], RAMP[lower + 1][c]];
        image.data[4 * i + c] = a + (b - a) * (place - lower);
      }
      image.data[4 * i + 3] = 255;
    });
    context.putImageData(image, 0, 0);
  };

  const start = () => {
    const byId = (id) => document.getElementById(id);
    const articles = [...viewer.querySelectorAll("article.clip")];
    const clips = data.viewer.clips.map((clip) => ({
      ...clip,
      masks: Object.fromEntries(Object.entries(clip.views).map(([name, row]) =>
        [name, Object.fromEntries(Object.entries(row).map(([ratio, mask]) =>
          [ratio, bytes(mask)]))])),
      decisiveMask: clip.decisive ? bytes(clip.decisive) : null,
      heats: Object.fromEntries(Object.entries(clip.scores).map(
        ([name, scores]) => [name, bytes(scores.tokens)])),
    }));
    const methods = [...new Set(clips.flatMap((c) => Object.keys(c.views)))];
    const ratios = [...new Set(clips.flatMap((c) =>
      Object.values(c.views).flatMap(Object.keys)))].sort((a, b) => a - b);
    const [method, ratio] = clips[0].shown;
    const state = { clip: 0, method, ratio: ratios.indexOf(ratio), frame: 0 };

    const right = (clip) =>
      clip.answers[state.method]?.[ratios[state.ratio]]?.[2];
    const matches = (clip) => {
      const wanted = byId("show").value;
      return wanted === "all" || right(clip) === (wanted === "right");
    };
    const matching = () =>
      clips.map((_, i) => i).filter((i) => matches(clips[i]));

    /** Sets what a picture shows of a frame of the current clip. */
    const overlay = (picture, clip, frame, mask) => {
      const [, height, width] = clip.grid;
      const count = height * width;
      const kept = tokensOf(mask, frame * count, count);
      const path = (name, d) =>
        picture.querySelector(`path.${name}`).setAttribute("d", d);
      path("kept", squares(kept, width));
      path("veil", mask
        ? `M0 0H${width}V${height}H0z${squares(kept, width)}` : "");
      path("decisive", squares(
        tokensOf(clip.decisiveMask, frame * count, count), width));
      const heat = clip.heats[state.method];
      const canvas = picture.querySelector("canvas");
      canvas.hidden = !heat;
      if (heat) {
        paint(canvas, heat.subarray(frame * count, (frame + 1) * count));
      }
      return kept.length;
    };

    const drawAnswer = (article, clip) => {
      const key = ratios[state.ratio];
      const said = clip.answers[state.method]?.[key];
      const [letter, text, good] = said ?? ["", "", null];
      const verdict = article.querySelector(".verdict");
      if (verdict) {
        verdict.className = `verdict ${good ? "yes" : "no"}`;
        verdict.textContent = said
          ? `${good ? "right" : "wrong"}: ${letter || "no letter"}`
          : "could not be run";
      }
      for (const option of article.querySelectorAll(".options li")) {
        const gold = option.dataset.letter === clip.gold;
        const chosen = option.dataset.letter === letter;
        option.classList.toggle("chosen", chosen && clip.gold !== "");
        option.classList.toggle("picked", chosen && clip.gold === "");
        option.querySelector(".marks").textContent =
          (gold ? " ✓ right answer" : "") + (chosen ? " ← answered" : "");
      }
      article.querySelector(".said q").textContent = text;
      for (const cell of article.querySelectorAll(".answers td[data-ratio]")) {
        const row = cell.closest("tr").dataset.method;
        const now = row === state.method && cell.dataset.ratio === key;
        cell.classList.toggle("now", now);
      }
    };

    const drawTimeline = (article, clip, counts) => {
      const scores = clip.scores[state.method];
      const most = Math.max(1, ...counts);
      const strip = article.querySelector(".timeline");
      const focused = strip.contains(document.activeElement);
      strip.style.setProperty("--frames", counts.length);
      strip.replaceChildren(...counts.map((count, t) => {
        const words = [`frame ${clip.labels[t]}: ${count} tokens kept`];
        const bars = [];
        if (scores) {
          words.push(`frame score ${scores.gaps[t]}, share of the clip's best`
            + ` ${scores.frames[t].toFixed(2)}`);
          const bar = make("i", { class: "score" });
          bar.style.height = `${Math.max(1, 36 * scores.frames[t])}px`;
          bars.push(bar);
        }
        const tokens = make("i", { class: "tokens" });
        tokens.style.height = `${(16 * count) / most}px`;
        const button = make("button", {
          type: "button", title: words.join("; "),
          "aria-label": words.join("; "),
          "aria-current": t === state.frame,
          tabindex: t === state.frame ? 0 : -1,
        }, ...bars, tokens, make("span", { class: "digits" },
          String(clip.labels[t])));
        button.addEventListener("click", () => jump(t));
        return button;
      }));
      if (focused) strip.children[state.frame].focus();
    };

    const draw = () => {
      const clip = clips[state.clip];
      const key = ratios[state.ratio];
      const mask = clip.masks[state.method]?.[key];
      const found = matching();
      articles.forEach((each, i) => {
        each.hidden = i !== state.clip || !found.length;
      });
      viewer.querySelector(".none").hidden = found.length > 0;
      const article = articles[state.clip];
      const frames = [...article.querySelectorAll(".frame")];
      const counts = frames.map((figure, t) => {
        const count = overlay(figure, clip, t, mask);
        figure.querySelector(".count").textContent = `${count} kept`;
        figure.querySelector("img").alt =
          `frame ${clip.labels[t]}, ${count} tokens kept`;
        figure.classList.toggle("current", t === state.frame);
        return count;
      });
      const all = clip.grid.reduce((a, b) => a * b);
      const total = counts.reduce((a, b) => a + b, 0);
      byId("share").textContent = mask
        ? `${percent(key)}, ${total} of ${all} tokens`
        : `${percent(key)}: ${state.method} could not be run`;
      byId("ratio").value = state.ratio;
      byId("ratio").setAttribute("aria-valuetext", byId("share").textContent);
      byId("method").value = state.method;
      byId("clip").value = state.clip;
      const place = found.indexOf(state.clip) + 1;
      byId("position").textContent = byId("show").value === "all"
        ? `clip ${state.clip + 1} of ${clips.length}`
        : `${found.length} of ${clips.length} clips match`
          + (place ? `; this is number ${place}` : "");
      drawKeeps(article, clip, mask, total, all);
      drawStage(article, clip, mask, counts);
      drawTimeline(article, clip, counts);
      drawAnswer(article, clip);
    };

    const drawKeeps = (article, clip, mask, total, all) => {
      const words = [mask
        ? `${state.method} keeps ${total} of ${all} tokens`
          + ` (${percent(ratios[state.ratio])})`
        : `${state.method} could not be run at ${percent(ratios[state.ratio])}`];
      if (mask && clip.decisiveMask) {
        const deciding = tokensOf(clip.decisiveMask, 0, all);
        const hit = deciding.filter((i) => (mask[i >> 3] >> (i & 7)) & 1);
        words.push(`among them ${hit.length} of the ${deciding.length}`
          + " that decide the question");
      }
      article.querySelector(".keeps").textContent = words.join(", ");
    };

    const drawStage = (article, clip, mask, counts) => {
      const stage = article.querySelector(".stage");
      const image = stage.querySelector("img");
      const source = article.querySelectorAll(".frame img")[state.frame];
      image.src = source.src;
      image.alt = source.alt;
      overlay(stage, clip, state.frame, mask);
      const scores = clip.scores[state.method];
      stage.querySelector(".caption").textContent =
        `frame ${clip.labels[state.frame]}, ${counts[state.frame]} tokens kept`
        + (scores ? `, frame score ${scores.gaps[state.frame]}` : "");
    };

    const jump = (frame) => {
      const count = clips[state.clip].grid[0];
      state.frame = (frame + count) % count;
      draw();
    };

    /** Goes to the next clip of those that match, round and round. */
    const turn = (step) => {
      const found = matching();
      if (!found.length) return;
      const ahead = step > 0
        ? found.find((i) => i > state.clip) ?? found[0]
        : found.findLast((i) => i < state.clip) ?? found[found.length - 1];
      goTo(ahead);
    };
    const goTo = (clip) => {
      state.clip = clip;
      state.frame = Math.min(state.frame, clips[clip].grid[0] - 1);
      draw();
    };
    const setRatio = (place) => {
      state.ratio = Math.max(0, Math.min(ratios.length - 1, place));
      draw();
    };

    byId("method").append(...methods.map((name) => make("option", {}, name)));
    byId("ratio").max = ratios.length - 1;
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("clip").addEventListener("change", (event) => {
      byId("show").value = "all";
      goTo(Number(event.target.value));
    });
    byId("show").addEventListener("change", () => {
      if (matches(clips[state.clip])) draw();
      else if (matching().length) turn(1);
      else draw();
    });
    byId("method").addEventListener("change", (event) => {
      state.method = event.target.value;
      draw();
    });
    byId("ratio").addEventListener("input", (event) =>
      setRatio(Number(event.target.value)));
    byId("heat").addEventListener("change", (event) =>
      viewer.classList.toggle("heated", event.target.checked));
    articles.forEach((article) => {
      article.querySelectorAll(".frame").forEach((figure, t) =>
        figure.addEventListener("click", () => jump(t)));
      for (const row of article.querySelectorAll(".answers tr[data-method]")) {
        if (!methods.includes(row.dataset.method)) continue;
        row.classList.add("looked");
        row.addEventListener("click", (event) => {
          const cell = event.target.closest("td[data-ratio]");
          if (!cell) return;
          state.method = row.dataset.method;
          setRatio(ratios.indexOf(cell.dataset.ratio));
        });
      }
    });

    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target;
      // Keys of a control, or of a table that scrolls, are its own; a slider
      // has no use for letters.
      const letter = event.key.length === 1;
      if (target.closest("select, summary, .scroll")) return;
      if (target.closest("input") && !letter) return;
      const inside = viewer.contains(target);
      if (!inside && target !== document.body) return;
      const frames = target.closest(".timeline");
      const actions = {
        j: () => turn(1),
        k: () => turn(-1),
        ArrowLeft: () => (frames ? jump(state.frame - 1) : turn(-1)),
        ArrowRight: () => (frames ? jump(state.frame + 1) : turn(1)),
      };
      if (inside) {
        actions.ArrowUp = () => setRatio(state.ratio + 1);
        actions.ArrowDown = () => setRatio(state.ratio - 1);
      }
      if (!(event.key in actions)) return;
      event.preventDefault();
      actions[event.key]();
    });
    viewer.classList.add("live");
    draw();
  };

  if (viewer && data.viewer.clips.length) start();
}
