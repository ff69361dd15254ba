// Elements, and text that models wrote: shown as text, never as markup.

/** Makes an element; `attributes` are properties, `children` strings (as text) and nodes. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Control codes but for tab and line feed, marks that turn the direction of text, and separators.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/g;

/** Appends text to a node, what cannot be seen spelled out as `\u001b`. */
function appendText(node, text) {
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > from) node.append(text.slice(from, match.index));
    const code = match[0].codePointAt(0).toString(16).padStart(4, "0");
    node.append(el("span", { className: "ctl", textContent: `\\u${code}` }));
    from = match.index + match[0].length;
  }
  if (from < text.length) node.append(text.slice(from));
  return node;
}

/** Returns an element of a model's text; its direction stays its own. */
function modelText(text, className = "", tag = "span") {
  return appendText(el(tag, { className: `model ${className}`, dir: "auto" }), String(text ?? ""));
}

const MATH_OPTIONS = { output: "mathml", throwOnError: false, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20 };
const MATH_MAX = 2000; // characters of one formula

/** Returns an element of a model's text with its formulas typeset: $, $$, \(, \[ and \boxed{}. */
function mathText(text, className = "", tag = "span") {
  const node = el(tag, { className: `model ${className}`, dir: "auto" });
  const source = String(text ?? "");
  let from = 0;
  for (const { start, end, tex, display } of formulas(source)) {
    appendText(node, source.slice(from, start));
    const place = el("span");
    katex.render(tex, place, { ...MATH_OPTIONS, displayMode: display });
    node.append(place);
    from = end;
  }
  return appendText(node, source.slice(from));
}

const FIRST = 6000; // characters of a long answer that are typeset at once

/** Returns an answer with its formulas typeset, a long one with a button for its rest. */
function answerText(text, className = "") {
  const source = String(text ?? "");
  const node = mathText(source.slice(0, FIRST), className, "div");
  if (source.length <= FIRST) return node;
  const more = el("button", {
    type: "button",
    className: "small",
    textContent: `the other ${num(source.length - FIRST)} characters`,
  });
  more.onclick = () => more.replaceWith(...mathText(source.slice(FIRST)).childNodes);
  node.append(" ", more);
  return node;
}

const DELIMITERS = [
  ["$$", "$$", true],
  ["\\[", "\\]", true],
  ["\\(", "\\)", false],
  ["$", "$", false],
];

/** Yields the formulas of a text: where each starts and ends, its TeX, and whether it is displayed. */
function* formulas(text) {
  let at = 0;
  while (at < text.length) {
    const next = text.slice(at).search(/\$|\\\[|\\\(|\\boxed\s*\{/);
    if (next < 0) return;
    at += next;
    const found = delimited(text, at) ?? boxed(text, at);
    if (found) {
      yield found;
      at = found.end;
    } else at += 1;
  }
}

function delimited(text, at) {
  for (const [open, close, display] of DELIMITERS) {
    if (!text.startsWith(open, at)) continue;
    const end = text.indexOf(close, at + open.length);
    if (end < 0) return null;
    const tex = text.slice(at + open.length, end);
    const prose = open === "$" && (/^\s|\s$|\n/.test(tex) || /^\d/.test(text[end + 1] ?? ""));
    if (tex.length === 0 || tex.length > MATH_MAX || prose) return null;
    return { start: at, end: end + close.length, tex, display };
  }
  return null;
}

function boxed(text, at) {
  if (!text.startsWith("\\boxed", at)) return null;
  let depth = 0;
  for (let i = text.indexOf("{", at); i < Math.min(text.length, at + MATH_MAX); i++) {
    if (text[i] === "{" && text[i - 1] !== "\\") depth += 1;
    if (text[i] === "}" && text[i - 1] !== "\\") depth -= 1;
    if (depth === 0) return { start: at, end: i + 1, tex: text.slice(at, i + 1), display: false };
  }
  return null;
}

/** Formats a number: enough digits to compare, none to be lost in. */
function num(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
}

function percent(value, digits = 0) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`;
}

function seconds(value) {
  if (value >= 7200) return `${(value / 3600).toFixed(1)} h`;
  if (value >= 120) return `${(value / 60).toFixed(1)} min`;
  return `${num(value, 3)} s`;
}
