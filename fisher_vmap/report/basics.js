"use strict";
const $ = (id) => document.getElementById(id);

/* ---- small helpers ---- */
function make(tag, properties = {}, ...children) {
  const { class: name, on = {}, style = {}, ...rest } = properties;
  const element = document.createElement(tag);
  if (name) element.className = name;
  for (const [event, call] of Object.entries(on)) element.addEventListener(event, call);
  Object.assign(element.style, style);
  for (const [key, value] of Object.entries(rest)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}
/* As escape.visible: what cannot be seen, or moves others, becomes its code point; joiners within a word stay. */
const UNSEEN = /^\p{M}|(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Z}\u115f\u1160\u2800\u3164\uffa0]|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])/gu;
const codePoint = (sign) => `<U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥" };
const visible = (token) => token.replace(UNSEEN, (sign) => SIGNS[sign] ?? codePoint(sign)) || "∅";
const readable = (piece) => piece.replace(UNSEEN, (sign) => /[ \n\t\p{Z}\p{M}]/u.test(sign) ? sign : codePoint(sign)).replace(/\n/g, "↵\n");
function pieceName(pieces, i) {
  const next = pieces.slice(i).find((piece) => piece !== "");
  return pieces[i] === "" && next !== undefined ? "part of " + visible(next) : visible(pieces[i]);
}
const percent = (x) => (x === null ? "–" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + "%");
function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  return size !== 0 && (size < 0.001 || size >= 10000) ? x.toExponential(2) : String(Number(x.toPrecision(3)));
}

/* ---- the tooltip: beside the mouse, or below a place that has the focus ---- */
const tip = $("tip");
function showTip(event, parts) {
  tip.replaceChildren(...parts);
  tip.hidden = false;
  const { clientX: x, clientY: y } = event, box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 16, innerWidth - box.width - 12)) + "px";
  tip.style.top = (y + box.height + 24 > innerHeight ? Math.max(8, y - box.height - 14) : y + 16) + "px";
}
const hideTip = () => { tip.hidden = true; };

/* ---- light and dark: "theme" is told to what draws in colours of its own ---- */
const theme = () => document.documentElement.dataset.theme;
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("theme"));
}
const prefers = matchMedia("(prefers-color-scheme: dark)");
setTheme(prefers.matches ? "dark" : "light");
prefers.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
