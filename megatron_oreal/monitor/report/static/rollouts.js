// Rollouts: answers to filter, and those to one question side by side.

const PAGE = 200; // rows drawn at once
const RATES = [
  ["", "any"],
  ["0-0", "0"],
  ["0-0.25", "above 0, below ¼"],
  ["0.25-0.5", "¼ to ½"],
  ["0.5-0.75", "½ to ¾"],
  ["0.75-1", "¾ to below 1"],
  ["1-1", "1"],
];
const OUTCOMES = [
  ["", "any"],
  ["correct", "correct"],
  ["incorrect", "incorrect"],
  ["unverified", "unverified"],
];

function inRate(item, rate) {
  if (!rate) return true;
  const [low, high] = rate.split("-").map(Number);
  const p = item.pass_rate;
  if (p === null || p === undefined) return false;
  return low === high ? p === low : p >= low && p < high && p > 0;
}

/** Returns the items that the state's filters leave. */
function filtered(data, state) {
  const text = (state.text ?? "").toLowerCase();
  return data.items.filter(
    (item) =>
      (state.run === undefined || item.run === state.run) &&
      (state.from === undefined || item.iteration >= state.from) &&
      (state.to === undefined || item.iteration <= state.to) &&
      (!state.outcome || item.outcome === state.outcome) &&
      inRate(item, state.rate) &&
      (!state.trained || item.trained) &&
      (!text ||
        [item.prompt, item.response, item.extracted, item.gold_answer, item.reason, item.prompt_id].some((part) =>
          String(part ?? "")
            .toLowerCase()
            .includes(text),
        )),
  );
}

function choices(id, label, options, value, change) {
  const select = el(
    "select",
    { id, onchange: () => change(select.value) },
    options.map(([v, name]) => el("option", { value: v, textContent: name, selected: String(v) === String(value ?? "") })),
  );
  return el("label", {}, label, select);
}

function numberBox(id, label, value, change) {
  const input = el("input", {
    id,
    type: "number",
    min: 0,
    value: value ?? "",
    onchange: () => change(input.value === "" ? undefined : Number(input.value)),
  });
  return el("label", {}, label, input);
}

function filters(data, state) {
  const set = (patch) => go({ ...patch, item: undefined });
  const text = el("input", {
    id: "f-text",
    type: "search",
    value: state.text ?? "",
    placeholder: "question or answer",
    oninput: () => set({ text: text.value || undefined }),
  });
  const runs =
    data.runs.length > 1
      ? choices("f-run", "run", [["", "all"], ...data.runs.map((run, i) => [i, run.label])], state.run, (v) =>
          set({ run: v === "" ? undefined : Number(v) }),
        )
      : null;
  return el(
    "div",
    { className: "filters", role: "search" },
    runs,
    numberBox("f-from", "from iteration", state.from, (from) => set({ from })),
    numberBox("f-to", "to iteration", state.to, (to) => set({ to })),
    choices("f-outcome", "verdict", OUTCOMES, state.outcome, (v) => set({ outcome: v || undefined })),
    choices("f-rate", "pass rate", RATES, state.rate, (v) => set({ rate: v || undefined })),
    choices(
      "f-trained",
      "trained on",
      [
        ["", "all"],
        ["1", "only these"],
      ],
      state.trained ? "1" : "",
      (v) => set({ trained: v ? 1 : undefined }),
    ),
    el("label", {}, "text", text),
    el("button", {
      id: "f-clear",
      type: "button",
      textContent: "All",
      title: "Clear the filters",
      onclick: () =>
        set({
          run: undefined,
          from: undefined,
          to: undefined,
          outcome: undefined,
          rate: undefined,
          trained: undefined,
          text: undefined,
        }),
    }),
  );
}

function rollouts(main, data, state) {
  main.append(
    filters(data, state),
    el("p", { className: "note small", id: "count" }),
    el(
      "div",
      { className: "split" },
      el("div", { className: "panel list", id: "list", role: "listbox", "aria-label": "Answers", tabIndex: 0 }),
      el("div", { id: "group" }),
    ),
  );
  showRollouts(data, state);
}

/** Fills the list and the group, and leaves the filters, in which someone may be typing. */
function showRollouts(data, state) {
  const items = filtered(data, state);
  const chosen = items.find((item) => item.index === state.item) ?? items[0];
  const place = Math.max(0, items.indexOf(chosen));
  const first = Math.floor(place / PAGE) * PAGE;
  const count = document.getElementById("count");
  count.textContent =
    `${num(items.length)} of ${num(data.items.length)} answers` +
    (items.length > PAGE ? `, ${first + 1} to ${Math.min(first + PAGE, items.length)} shown` : "") +
    ". " +
    data.runs.map(shownShare).join(" ");
  const list = document.getElementById("list");
  const pageTurn = (label, at) =>
    items[at]
      ? el("button", { type: "button", className: "row muted", textContent: label, onclick: () => go({ item: items[at].index }) })
      : null;
  list.replaceChildren(
    ...[
      first ? pageTurn("earlier ones", first - PAGE) : null,
      ...items.slice(first, first + PAGE).map((item) => rowOf(item, item === chosen)),
      pageTurn("more", first + PAGE),
    ].filter(Boolean),
  );
  list.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  document
    .getElementById("group")
    .replaceChildren(
      ...(chosen ? groupOf(data, chosen) : [el("p", { className: "note", textContent: "No answer passes these filters." })]),
    );
}

function rowOf(item, selected) {
  return el(
    "button",
    {
      type: "button",
      className: "row",
      role: "option",
      "aria-selected": String(selected),
      "data-item": String(item.index),
      onclick: () => go({ item: item.index }),
    },
    el(
      "span",
      { className: "line" },
      outcomeTag(item),
      ` ${item.iteration} · p ${num(item.pass_rate, 2)}${item.trained ? " · trained" : ""}`,
    ),
    modelText(item.prompt.slice(0, 200).replace(/\s+/g, " "), "line"),
  );
}

function outcomeTag(item) {
  return el("span", { className: `tag ${item.outcome ?? ""}`, textContent: item.outcome ?? "not judged" });
}

function groupOf(data, chosen) {
  const group = data.items
    .filter((item) => item.run === chosen.run && item.iteration === chosen.iteration && item.prompt_id === chosen.prompt_id)
    .sort((a, b) => b.trained - a.trained || (b.reward ?? 0) - (a.reward ?? 0) || a.sample - b.sample);
  return [
    el(
      "div",
      { className: "panel", id: "question" },
      el(
        "h3",
        {},
        "Question ",
        modelText(chosen.prompt_id),
        ` of iteration ${chosen.iteration}`,
        data.runs.length > 1 ? `, ${data.runs[chosen.run].label}` : "",
      ),
      mathText(chosen.prompt, "", "div"),
      facts([
        ["gold answer", mathText(chosen.gold_answer)],
        ["pass rate", num(chosen.pass_rate, 3)],
      ]),
    ),
    el("h2", { textContent: `${group.length} answer${group.length > 1 ? "s" : ""} written out` }),
    el(
      "div",
      { className: "cards" },
      group.map((item) => cardOf(item, item === chosen)),
    ),
  ];
}

function cardOf(item, chosen) {
  const sign = item.trained ? (item.reward > 0 ? " y+" : " y−") : "";
  return el(
    "article",
    { className: "panel card", "data-item": String(item.index), "aria-current": String(chosen) },
    el(
      "div",
      { className: "token-head" },
      outcomeTag(item),
      el("strong", { textContent: `answer ${item.sample}${sign}` }),
      el("button", {
        type: "button",
        textContent: "Tokens",
        onclick: () => go({ view: "tokens", item: item.index, token: undefined }),
      }),
    ),
    facts(verdictFacts(item)),
    answerText(item.response, "answer"),
  );
}

function verdictFacts(item) {
  return [
    ["extracted", item.extracted === null ? "nothing" : mathText(item.extracted)],
    ["verdict", `${item.outcome ?? "none"}${item.decided_by ? ` by ${item.decided_by}` : ""}`],
    ["reason", modelText(item.reason ?? "–")],
    ["advantage", num(item.advantage, 3)],
    ["length", `${num(item.response_length ?? item.n)} tokens${item.stopped ? "" : ", cut by the limit"}`],
    item.score !== null && item.score !== undefined ? ["mean score", num(item.score, 3)] : null,
  ].filter(Boolean);
}

function facts(pairs, className = "") {
  return el(
    "dl",
    { className: `facts ${className}` },
    pairs.map(([name, value]) => el("div", {}, el("dt", { textContent: name }), el("dd", {}, value))),
  );
}
