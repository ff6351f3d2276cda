
/* ---- the Jacobian lens: a table for each prompt, made when it is opened; its tokens have been made visible already ---- */
(() => {
  const LENS = JSON.parse($("lens-data").textContent);
  let order = "logit";
  const tables = [];
  const pairs = (cell) => Array.from({ length: cell.length / 2 }, (_, i) => [LENS.words[cell[2 * i]], cell[2 * i + 1]]);
  const byKl = (prompt, row) => order === "kl" && prompt.kl !== null && row > 0; // the model's own row is always by logit
  const cellAt = (prompt, row, column) => (row === 0 ? prompt.model : (byKl(prompt, row) ? prompt.kl : prompt.top)[row - 1])[column] ?? [];
  const rowName = (prompt, row) => (row === 0 ? "output" : String(prompt.layers[row - 1]));
  const nats = (x) => (x === null ? "–" : `${number(x)} nats`);

  function tableOf(prompt) {
    const largest = Math.max(1e-300, ...(prompt.kl ?? []).flatMap((row) => row.map((cell) => cell[1] ?? 0)));
    const filled = (place, row, column) => {
      const [word, value] = cellAt(prompt, row, column), kl = byKl(prompt, row);
      place.textContent = word === undefined ? "–" : LENS.words[word];
      place.classList.toggle("same", row > 0 && word !== undefined && word === prompt.model[column][0]);
      const part = value === undefined || value === null ? 0 : kl ? value / largest : Math.exp(value);
      place.style.setProperty("--part", Math.min(1, Math.max(0, part)).toFixed(3));
    };
    const place = (row, column) => table.tBodies[0].rows[row].cells[column + 1];
    const show = (cell, at) => {
      const [row, column] = [cell.parentElement.rowIndex - 1, cell.cellIndex - 1], kl = byKl(prompt, row);
      const lines = pairs(cellAt(prompt, row, column)).flatMap(([word, value]) => [make("span", { class: "token" }, word),
        ...(kl ? [] : [make("span", { class: "value" }, value === null ? "–" : percent(Math.exp(value)))]), make("span", { class: "value" }, nats(value))]);
      const where = row === 0 ? "the model's output" : `layer ${rowName(prompt, row)}`;
      showTip(at, [make("div", {}, make("b", {}, where), ` · position ${column}, after `, make("b", {}, LENS.words[prompt.tokens[column]])),
        make("div", { class: "muted" }, kl ? "share in the KL of a unit step" : "probability and log p"), make("div", { class: kl ? "reads kl" : "reads" }, ...lines)]);
    };
    const below = (cell) => { const box = cell.getBoundingClientRect(); return { clientX: box.left, clientY: box.bottom - 12 }; };
    let moved = 0; // when a key last moved the focus: the tooltip stays while its cell is brought into view
    const scrolled = () => performance.now() - moved < 200 ? show(document.activeElement, below(document.activeElement)) : hideTip();
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...prompt.tokens.map((word, column) =>
      make("th", { scope: "col", title: `position ${column}` }, make("bdi", {}, LENS.words[word]))));
    const rows = [null, ...prompt.layers].map((_, row) => make("tr", { class: row === 0 ? "output" : "" }, make("th", { scope: "row" }, rowName(prompt, row)),
      ...prompt.tokens.map(() => make("td", { tabindex: "-1" }))));
    const table = make("table", { class: "lens", on: {
      mouseover: (event) => event.target.matches("td") ? show(event.target, event) : hideTip(),
      mouseleave: hideTip,
      focusin: (event) => {
        if (!event.target.matches("td")) return;
        for (const other of table.querySelectorAll("td[tabindex='0']")) other.tabIndex = -1;
        event.target.tabIndex = 0;
        show(event.target, below(event.target));
      },
      focusout: hideTip,
      keydown: (event) => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (event.key === "Escape") return hideTip();
        if (!step || !event.target.matches("td")) return;
        const row = event.target.parentElement.rowIndex - 1 + step[0], column = event.target.cellIndex - 1 + step[1];
        event.preventDefault();
        if (row < 0 || row > prompt.layers.length || column < 0 || column >= prompt.tokens.length) return;
        moved = performance.now();
        place(row, column).focus({ preventScroll: true });
        place(row, column).scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
        scrolled();
      },
    } }, make("thead", {}, head), make("tbody", {}, ...rows));
    const fill = () => {
      for (let row = 0; row <= prompt.layers.length; row++) for (let column = 0; column < prompt.tokens.length; column++) filled(place(row, column), row, column);
    };
    tables.push(fill);
    fill();
    place(0, 0).tabIndex = 0;
    return make("div", { class: "scroll", on: { scroll: scrolled } }, table);
  }

  const parts = LENS.prompts.map((prompt) => {
    const part = make("details", { class: "read" }, make("summary", {}, make("bdi", {}, prompt.text), make("span", { class: "muted" }, ` · ${prompt.tokens.length} tokens`)));
    part.addEventListener("toggle", () => { if (part.open && part.children.length === 1) part.append(tableOf(prompt)); });
    return part;
  });
  parts[0].open = true;
  $("lens-prompts").append(...parts);
  for (const [name, title] of $("lens-order") ? [["logit", "by logit"], ["kl", "by KL"]] : []) {
    $("lens-order").append(make("button", { type: "button", "aria-pressed": String(name === order), on: { click: (event) => {
      order = name;
      for (const button of event.target.parentElement.children) button.setAttribute("aria-pressed", String(button === event.target));
      for (const fill of tables) fill();
    } } }, title));
  }
})();
