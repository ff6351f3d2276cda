const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 25;
const rowOf = new Map(DATA.rows.index.map((index, i) => [index, i]));
const state = { layer: 0, chosen: {}, prompt: null, direction: 0, page: 0, sort: "index", down: false, search: "" };

function percentile(values, x) {
  const known = values.filter((value) => value !== null);
  return Math.round((100 * known.filter((value) => value < x).length) / Math.max(1, known.length - 1));
}

/* ---- colours: "@blue/0.2" becomes the theme's blue with that opacity ---- */
const SCALES = {
  light: [[0, "#f7f9fc"], [0.25, "#c9dcee"], [0.5, "#7fb0d8"], [0.75, "#2f78b5"], [1, "#08305e"]],
  points: [[0, "#a9c9e6"], [0.5, "#2f78b5"], [1, "#06203f"]],
  points_dark: [[0, "#24618f"], [0.5, "#6db5e8"], [1, "#f4f9fe"]],
  dark: [[0, "#1a1f26"], [0.25, "#173f66"], [0.5, "#2472ad"], [0.75, "#6db5e8"], [1, "#eef6fd"]],
};
function colour(text) {
  const [name, opacity] = text.slice(1).split("/");
  if (name === "scale") return SCALES[theme()];
  if (name === "points") return SCALES[theme() === "dark" ? "points_dark" : "points"];
  const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  if (opacity === undefined) return hex;
  return `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${opacity})`;
}
function coloured(value, property = "") {
  if (typeof value === "string") return property.includes("color") && value.startsWith("@") ? colour(value) : value;
  if (Array.isArray(value)) return value.map((inner) => coloured(inner, property));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, key === "bdata" ? inner : coloured(inner, key)]));
  }
  return value;
}

/* ---- the tooltip of a prompt ---- */
function promptLines(index) {
  const row = rowOf.get(index);
  if (row === undefined) return [make("div", {}, `prompt ${index}`)];
  const { rows, layers } = DATA, layer = layers[state.layer];
  const groups = Object.entries(rows.groups).map(([name, values]) => ` · ${name} ${values[row]}`).join("");
  return [
    make("div", {}, make("b", {}, `${index}`), ` · ${rows.tokens[row]} tokens${groups}`),
    make("div", {}, rows.text[row]),
    ...(DATA.written ? [make("div", { class: "muted" }, "completion:"), make("div", {}, rows.top[row])] : [make("div", { class: "tokens" }, DATA.outcome + ": ", ...apart(rows.top[row]))]),
    make("div", { class: "muted" }, `trace ${number(layer.trace[row])} · effective rank ${number(layer.effective_rank[row])} · ` +
      (rows.targets ? `${number(rows.targets[row])} targets, mean entropy ${number(rows.entropy[row])} nats` : `covered ${percent(rows.mass[row])}`)),
  ];
}
/* ---- figures ---- */
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
function draw(element, figure) {
  const spec = coloured(figure);
  Plotly.react(element, spec.data, spec.layout, CONFIG);
  if (element.dataset.ready) return;
  element.dataset.ready = "1";
  const promptsOf = (point) => {
    if (point.data.type !== "heatmap") return point.customdata === undefined || point.data.mode === undefined ? [] : [point.customdata];
    const order = DATA.layers[state.layer].similarity;
    return [order[Math.round(point.y)], order[Math.round(point.x)]];
  };
  element.on("plotly_hover", (hover) => {
    const point = hover.points[0], prompts = promptsOf(point);
    if (!prompts.length) return;
    if (point.data.type !== "heatmap") return showTip(hover.event, promptLines(prompts[0]));
    const same = prompts[0] === prompts[1];
    const between = [make("div", {}, make("b", {}, "cosine " + (point.z / 100).toFixed(2))), make("hr")];
    showTip(hover.event, same ? promptLines(prompts[0]) : [...between, ...promptLines(prompts[0]), make("hr"), ...promptLines(prompts[1])]);
  });
  element.on("plotly_unhover", hideTip);
  element.on("plotly_click", (click) => {
    const prompts = promptsOf(click.points[0]);
    if (prompts.length) openPrompt(prompts[0]);
  });
}
function drawAll() {
  const figures = DATA.layers[state.layer].figures;
  for (const element of document.querySelectorAll("[data-figure]")) {
    const kind = element.dataset.figure, by = state.chosen[kind];
    const name = by === undefined || by === null ? kind : `${kind} by ${by}`;
    if (figures[name]) draw(element, figures[name]);
  }
  for (const element of document.querySelectorAll("[data-layers]")) draw(element, DATA.layer_figures[element.dataset.layers]);
}
function offerChoices() {
  const groups = Object.keys(DATA.rows.groups);
  const choices = { scatter: [null, ...groups], similarity: groups.length ? [null, ...groups] : [] };
  for (const place of document.querySelectorAll("[data-choose]")) {
    const kind = place.dataset.choose;
    state.chosen[kind] = kind === "scatter" ? null : groups[0] ?? null;
    if (choices[kind].length < 2) continue;
    place.append("colour by");
    for (const value of choices[kind]) {
      place.append(make("button", {
        type: "button", "aria-pressed": String(value === state.chosen[kind]),
        on: { click: (event) => {
          state.chosen[kind] = value;
          for (const button of place.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === event.target));
          drawAll();
        } },
      }, value ?? (kind === "scatter" ? DATA.shade : "nothing")));
    }
  }
}

/* ---- overview and outliers ---- */
function showGlance() {
  const layer = DATA.layers[state.layer];
  $("tiles").replaceChildren(...[...DATA.tiles, ...layer.tiles].map(([value, label]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, label))));
  $("findings").replaceChildren(...layer.findings.map((text) => make("li", {}, text)));
}
function promptRow(index, ...cells) {
  const open = () => openPrompt(index);
  return make("tr", { tabindex: "0", on: { click: open, keydown: (event) => event.key === "Enter" && open() } }, ...cells);
}
const cell = (text, name = "") => make("td", { class: name }, text);
/* Each token for itself: two that are written from the right would change places. */
const apart = (line) => line.split(" ").flatMap((token) => [make("bdi", {}, token), " "]);
const tokenCell = (line) => DATA.written ? cell(line, "text") : make("td", { class: "tokens" }, ...apart(line));
function showOutliers() {
  if (!$("unlike")) return;
  const unlike = DATA.layers[state.layer].outliers;
  $("nobody").hidden = unlike.length > 0;
  const head = make("thead", {}, make("tr", {}, ...["score", "prompt", "", "why", DATA.outcome].map((title, i) => make("th", { class: i < 2 ? "number" : "" }, title))));
  const body = make("tbody", {}, ...unlike.map((found) => {
    const row = rowOf.get(found.index);
    const why = make("td", { class: "reasons" }, ...found.reasons.map((reason) => make("div", {}, reason)));
    return promptRow(found.index, cell(found.score.toFixed(1), "number"), cell(String(found.index), "number"), cell(DATA.rows.text[row], "text"), why, tokenCell(DATA.rows.top[row]));
  }));
  $("unlike").replaceChildren(...(unlike.length ? [head, body] : []));
  const company = unlike.find((found) => found.company.length)?.company;
  $("snippet").replaceChildren(...(company ? ["What the first of these groups shares, in Python: ", make("code", {},
    `results.contrast(lambda row: row["prompt_index"] in {${company.join(", ")}}).directions[0]`)] : []));
}

/* ---- one prompt ---- */
function openPrompt(index, scroll = true) {
  if (!$("prompt") || !rowOf.has(index)) return;
  state.prompt = index;
  state.direction = 0;
  showPrompt();
  hideTip();
  if (scroll) { history.replaceState(null, "", "#prompt-" + index); $("prompt").scrollIntoView(); }
}
function showPrompt() {
  if (!$("prompt") || state.prompt === null) return;
  const index = state.prompt, row = rowOf.get(index), detail = DATA.details[index], { rows } = DATA;
  const layer = DATA.layers[state.layer];
  $("which").textContent = `Prompt ${index}`;
  $("goto").value = index;
  const fact = (label, value, all) => make("span", {}, make("span", { class: "muted" }, label + " "), make("b", {}, value),
    make("span", { class: "muted" }, all ? ` (${all}% of prompts have less)` : ""));
  const groups = Object.entries(rows.groups).map(([name, values]) => fact(name, values[row]));
  const facts = make("div", { class: "facts" },
    fact("tokens", String(rows.tokens[row])), ...(rows.targets ? targetFacts(row, detail) : [fact("covered", percent(rows.mass[row]))]),
    fact("trace", number(layer.trace[row]), percentile(layer.trace, layer.trace[row])),
    fact("trace × norm²", number(layer.trace_norm2[row]), percentile(layer.trace_norm2, layer.trace_norm2[row])),
    fact("effective rank", number(layer.effective_rank[row]), percentile(layer.effective_rank, layer.effective_rank[row])), ...groups);
  if (!detail) {
    const why = rows.status[row] === "ok" ? `Not one of the prompts shown in full; add it with: fisher-vmap report DIR --prompts ${index}` : rows.status[row];
    return $("one").replaceChildren(facts, make("div", { class: "coloured" }, rows.text[row]), make("p", { class: "note" }, why));
  }
  const own = detail.layers[layer.name];
  $("one").replaceChildren(facts, make("h3", {}, "Which tokens the output hangs on"), ...energyText(detail, own),
    ...(detail.targets ? [make("h3", {}, "Which predicted tokens carry the sensitivity"), ...targetTexts(detail.targets, own)] : []),
    make("h3", {}, "What each direction trades"), ...directionParts(detail, own), ...neighbours(index));
}
const strength = (x, most) => (x > 0 ? Math.max(0, 0.85 * (1 + Math.log10(x / most) / 3)) : 0);
const shaded = (pieces, i, opacity, lines, more = "") => make("span", {
  class: more, style: { background: `rgba(var(--heat), ${opacity.toFixed(3)})` },
  on: { mousemove: (event) => showTip(event, [make("div", {}, make("b", {}, pieceName(pieces, i)), lines[0]), ...lines.slice(1).map((line) => make("div", {}, line))]), mouseleave: hideTip },
}, readable(pieces[i]));
function energyText(detail, own) {
  const total = own.energy.reduce((sum, x) => sum + x, 0), most = Math.max(...own.energy);
  const share = (x) => `${(100 * x / total).toPrecision(2)}% of the energy`;
  if (!detail.pieces) {
    const text = make("div", { class: "coloured" }, detail.text ?? "(no text stored)");
    return [text, make("p", { class: "note" }, "The prompt's tokens are not stored in this run, so its text is not coloured.")];
  }
  const start = detail.targets?.start ?? null;
  const spans = detail.pieces.map((_, i) => shaded(detail.pieces, i, strength(own.energy[i], most),
    [` · position ${i}${start !== null && i >= start ? ", of the completion" : ""}`, share(own.energy[i])], i === start ? "start" : ""));
  const order = own.energy.map((x, i) => [x, i]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const last = start === null ? detail.pieces.length - 1 : start - 1, note = start === null ? " (the last)" : " (the prompt's last)";
  const lead = order.map(([x, i]) => `${pieceName(detail.pieces, i)}${i === last ? note : ""} ${(100 * x / total).toFixed(0)}%`).join(", ");
  return [make("div", { class: "coloured" }, ...spans), make("div", { class: "key" }, "a thousandth of the strongest", make("i"), "the strongest · position energy Σ pₜ |gₜ|² of each token, on a logarithmic scale"),
    make("div", { class: "key" }, `most of it: ${lead}`),
    ...(start === null ? [] : [make("div", { class: "key" }, "the line marks where the completion begins")])];
}
/* ---- several targets: the token that each predicts, coloured by what the target adds to the trace ---- */
function targetFacts(row, detail) {
  const { rows } = DATA, own = detail?.layers[DATA.layers[state.layer].name];
  const fact = (label, value) => make("span", {}, make("span", { class: "muted" }, label + " "), make("b", {}, value));
  const samples = detail?.targets?.blocks.length ?? 1;
  return [fact("targets", number(rows.targets[row]) + (samples > 1 ? ` in ${samples} completions` : "")), fact("mean entropy", `${number(rows.entropy[row])} nats`),
    fact("mean log p", `${number(rows.log_prob[row])} nats`),
    ...(own && own.trace_error !== null ? [fact("standard error of the trace", number(own.trace_error))] : [])];
}
function targetTexts(targets, own) {
  const trace = own.target_trace, most = Math.max(...trace) || 1, several = targets.blocks.length > 1;
  const part = (j) => 0.85 * trace[j] / most; // linear: traces of targets differ less than the energies of positions
  const of = (block) => block.targets.reduce((sum, j) => sum + trace[j], 0);
  const parts = targets.blocks.map((block, number_) => {
    const total = of(block), share = (j) => `${(100 * trace[j] / total).toPrecision(2)}% of the trace`;
    const about = (j) => [share(j), `target ${targets.position[j]}, after ${targets.before[j] || "∅"}`, `log p ${number(targets.log_prob[j])}, entropy ${number(targets.entropy[j])} nats`];
    const head = make("div", { class: "key" }, (several ? `completion ${number_ + 1}: ` : "") + `log p ${number(block.log_prob)} nats in all · mean entropy ${number(block.entropy)} nats a target · trace ${number(total)}`);
    if (!block.pieces) return [head, make("p", { class: "note" }, "The tokens are not stored in this run, so there is no text to colour.")];
    const spans = block.pieces.map((_, i) => block.of[i] === null ? make("span", {}, readable(block.pieces[i]))
      : shaded(block.pieces, i, part(block.of[i]), [` · position ${block.first + i}`, ...about(block.of[i])]));
    if (block.after !== null) spans.push(shaded(["…"], 0, part(block.after), [" what follows the last token", ...about(block.after)], "after"));
    const named = (j) => block.of.includes(j) ? pieceName(block.pieces, block.of.indexOf(j)) : "what follows";
    const lead = [...block.targets].sort((a, b) => trace[b] - trace[a]).slice(0, 3).map((j) => `${named(j)} ${(100 * trace[j] / total).toFixed(0)}%`).join(", ");
    return [head, make("div", { class: "coloured" }, ...spans), make("div", { class: "key" }, `most of it: ${lead}`)];
  });
  return [...parts.flat(), make("div", { class: "key" }, "nothing", make("i"), "the strongest · part of the trace that the distribution of each token adds")];
}
function pairParts(detail, own, r) {
  const { targets } = detail, pairs = own.pairs[r], several = targets.blocks.length > 1;
  const most = Math.max(...pairs.map(([, x]) => Math.abs(x))) || 1;
  const head = [several ? "target · completion" : "target", "after", "token", "id", "p", "", "change"].map((title) => make("span", { class: "muted title" }, title));
  const rows = pairs.flatMap(([k, x]) => {
    const j = targets.of[k], width = (50 * Math.abs(x)) / most, taken = targets.taken[k];
    const bar = make("i", { style: { background: x > 0 ? "var(--blue)" : "var(--orange)", width: width + "%", left: (x > 0 ? 50 : 50 - width) + "%" } });
    return [make("span", { class: "muted id" }, `${targets.position[j]}${several ? ` · ${targets.sample[j] + 1}` : ""}`), make("span", { class: "token muted", title: targets.before[j] }, targets.before[j]),
      make("span", { class: taken ? "token taken" : "token", title: detail.top[k] + (taken ? " · the completion's own token" : "") }, visible(detail.top[k])), make("span", { class: "muted id", title: "the token's id" }, String(detail.ids[k])), make("span", { class: "muted value" }, percent(detail.p[k])),
      make("span", { class: "track" }, bar), make("span", { class: "value" }, (x > 0 ? "+" : "−") + number(Math.abs(x)))];
  });
  return [make("div", { class: "trade pairs" }, ...head, ...rows), make("p", { class: "say below" }, `The ${pairs.length} pairs of a target and a token with the largest change, of ${detail.ids.filter((id) => id >= 0).length} that are stored. `
    + `"target" is the position whose distribution it is${several ? " and the number of its completion" : ""}, "after" the token there` + (targets.written ? "; in bold, a token that the completion has there." : "."))];
}
function directionParts(detail, own) {
  const r = Math.min(state.direction, own.S.length - 1);
  if (r < 0) return [make("p", {}, "The matrix is zero.")];
  const buttons = own.S.map((value, i) => make("button", { type: "button", "aria-pressed": String(i === r), on: { click: () => { state.direction = i; showPrompt(); } } },
    `${i + 1} · ${percent(value / own.trace)}`));
  const step = Math.sqrt(0.02 / own.S[r]);
  const said = [make("div", { class: "directions" }, ...buttons), make("p", { class: "say" },
    `Direction ${r + 1} holds ${percent(own.S[r] / own.trace)} of the trace. A step of length ${number(step)}, ${number(100 * step / own.norm)}% of the residual stream's ${DATA.average} norm, `
    + "costs a KL divergence of 0.01 nats by F. Bars: change of log p, in nats, for a step of length 1; the sign of a direction is arbitrary.")];
  if (detail.targets) return [...said, ...pairParts(detail, own, r)];
  const trades = own.trades[r], order = trades.map((x, t) => [x, t]).sort((a, b) => b[0] - a[0]);
  const most = Math.max(...trades.map(Math.abs)) || 1;
  const bars = order.flatMap(([x, t]) => {
    const width = (50 * Math.abs(x)) / most;
    const bar = make("i", { style: { background: x > 0 ? "var(--blue)" : "var(--orange)", width: width + "%", left: (x > 0 ? 50 : 50 - width) + "%" } });
    return [make("span", { class: "token", title: detail.top[t] }, visible(detail.top[t])), make("span", { class: "muted id", title: "the token's id" }, detail.ids[t] < 0 ? "" : String(detail.ids[t])), make("span", { class: "muted value" }, percent(detail.p[t])),
      make("span", { class: "track" }, bar), make("span", { class: "value" }, (x > 0 ? "+" : "−") + number(Math.abs(x)))];
  });
  return [...said, make("div", { class: "trade" }, ...bars)];
}
function neighbours(index) {
  const order = DATA.layers[state.layer].similarity, at = order ? order.indexOf(index) : -1;
  if (at < 0) return [];
  const size = order.length, bytes = cosinesOf(state.layer);
  const near = order.map((other, j) => [bytes[at * size + j] / 100, other]).filter(([, other]) => other !== index).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const body = make("tbody", {}, ...near.map(([cosine, other]) => promptRow(other, cell(cosine.toFixed(2), "number"), cell(String(other), "number"), cell(DATA.rows.text[rowOf.get(other)], "text"), tokenCell(DATA.rows.top[rowOf.get(other)]))));
  return [make("h3", {}, "Most alike, by the cosine of their matrices"), make("div", { class: "scroll" }, make("table", { class: "list" }, body))];
}
const decoded = [];
function cosinesOf(layer) {
  decoded[layer] ??= Uint8Array.from(atob(DATA.layers[layer].figures.similarity.data[0].z.bdata), (letter) => letter.charCodeAt(0));
  return decoded[layer];
}

/* ---- the table ---- */
const COLUMNS = [
  ["index", "#", (row) => DATA.rows.index[row]],
  ["text", "prompt", (row) => DATA.rows.text[row]],
  ["top", DATA.outcome, (row) => DATA.rows.top[row]],
  ...Object.keys(DATA.rows.groups).map((name) => ["group " + name, name, (row) => DATA.rows.groups[name][row]]),
  ["tokens", "tokens", (row) => DATA.rows.tokens[row]],
  ...(DATA.rows.targets ? [["targets", "targets", (row) => DATA.rows.targets[row]], ["entropy", "entropy", (row) => DATA.rows.entropy[row]]] : [["mass", "covered", (row) => DATA.rows.mass[row]]]),
  ["trace", "trace", (row) => DATA.layers[state.layer].trace[row]],
  ["trace_norm2", "trace × norm²", (row) => DATA.layers[state.layer].trace_norm2[row]],
  ["rank", "eff. rank", (row) => DATA.layers[state.layer].effective_rank[row]],
  ...(DATA.single ? [["score", "unlike", (row) => DATA.layers[state.layer].score[row]]] : []),
];
const words = (key) => key === "text" || key === "top" || key.startsWith("group ");
const haystack = DATA.rows.index.map((index, i) => [index, DATA.rows.text[i], DATA.rows.top[i], DATA.rows.status[i], ...Object.values(DATA.rows.groups).map((values) => values[i])].join(" ").toLowerCase());
function showTable() {
  const asked = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = haystack.map((_, i) => i).filter((i) => asked.every((word) => haystack[i].includes(word)));
  const value = COLUMNS.find(([key]) => key === state.sort)[2], way = state.down ? -1 : 1;
  const missing = (x) => x === null || x === undefined;
  found.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    return way * (typeof x === "string" ? x.localeCompare(y) : x - y) || a - b;
  });
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const head = make("thead", {}, make("tr", {}, ...COLUMNS.map(([key, title]) => make("th", {
    class: words(key) ? "" : "number", "aria-sort": key === state.sort ? (state.down ? "descending" : "ascending") : "none",
  }, make("button", { type: "button", on: { click: () => { state.down = key === state.sort ? !state.down : !words(key) && key !== "index"; state.sort = key; state.page = 0; showTable(); } } }, title)))));
  const body = make("tbody", {}, ...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map((row) => promptRow(DATA.rows.index[row], ...COLUMNS.map(([key, , of]) => {
    const x = of(row);
    if (key === "top") return tokenCell(x);
    if (words(key)) return cell(x, key === "text" ? "text" : "");
    return cell(key === "mass" ? percent(x) : key === "index" ? String(x) : number(x), "number");
  }))));
  $("rows").replaceChildren(head, body);
  $("count").textContent = `${found.length.toLocaleString("en")} of ${DATA.total.toLocaleString("en")} prompts${DATA.rows.index.length < DATA.total ? ` (${DATA.rows.index.length.toLocaleString("en")} are in this table)` : ""}. A click on a heading sorts, on a row opens the prompt.`;
  $("page").textContent = `${state.page + 1} / ${pages}`;
  $("back").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
}

/* ---- start ---- */
function setLayer(number) {
  state.layer = number;
  showGlance(); showOutliers(); drawAll(); showPrompt(); showTable();
}
offerChoices();
setLayer(0);
document.addEventListener("theme", drawAll);
$("search").addEventListener("input", (event) => { state.search = event.target.value; state.page = 0; showTable(); });
$("back").addEventListener("click", () => { state.page -= 1; showTable(); });
$("next").addEventListener("click", () => { state.page += 1; showTable(); });
if ($("layer")) {
  $("layer").append(...DATA.layers.map((layer, i) => make("option", { value: String(i) }, layer.name)));
  $("layer").addEventListener("change", (event) => setLayer(Number(event.target.value)));
}
if ($("prompt")) {
  const shown = Object.keys(DATA.details).map(Number).sort((a, b) => a - b);
  const walk = (by) => {
    const at = shown.findIndex((index) => index >= state.prompt);
    openPrompt(shown[(Math.max(at, 0) + by + shown.length) % shown.length]);
  };
  $("before").addEventListener("click", () => walk(-1));
  $("after").addEventListener("click", () => walk(1));
  $("goto").addEventListener("change", (event) => openPrompt(Number(event.target.value)));
  const wanted = Number(location.hash.replace("#prompt-", ""));
  if (location.hash.startsWith("#prompt-") && rowOf.has(wanted)) openPrompt(wanted);
  else openPrompt(DATA.layers[0].outliers[0]?.index ?? shown[0], false);
}
