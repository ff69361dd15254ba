// One answer, token by token: tinted by weight, q under it, and where q falls the most.

let shown = null; // the open answer: item, tokens, texts, spans, plot, fall

const NUMBERS = [
  ["score s", (t, i) => num(t.token_score[i])],
  ["running mean", (t, i) => num(t.mean[i])],
  ["q", (t, i) => num(t.q[i])],
  ["weight", (t, i) => num(t.token_weight[i])],
  ["log-prob. policy", (t, i) => num(t.policy[i])],
  ["reference", (t, i) => num(t.reference[i])],
  ["vLLM", (t, i) => num(t.rollout_logprob[i])],
  ["entropy", (t, i) => num(t.entropy[i])],
];

async function tokensView(main, data, state) {
  const items = filtered(data, state);
  const item = data.items[state.item] ?? items.find((each) => each.trained) ?? items[0] ?? data.items[0];
  if (!item) return main.append(el("p", { className: "note", textContent: "The run wrote no transcripts." }));
  const tokens = await tokensOf(item);
  const texts = tokens ? textsOf(data, tokens.piece) : [];
  const fall = tokens && largestFall(tokens, data.runs[item.run].score_is_before);
  shown = { item, tokens, texts, fall, at: null, spans: [], plot: null, data };
  main.replaceChildren(...tokenPanels(data, state, items));
  if (tokens) {
    if (tokens.scored) shown.plot = drawQ(tokens, document.getElementById("q-chart"), state);
    await new Promise((resume) => setTimeout(resume)); // until the chart knows its scales
    pointAt(state.token ?? null, { scroll: true });
  }
  return null;
}

function tokenPanels(data, state, items) {
  const { item, tokens, fall } = shown;
  const place = items.indexOf(item);
  const step = (by) => items[place + by] && go({ item: items[place + by].index, token: undefined });
  const head = el(
    "div",
    { className: "token-head" },
    el("button", {
      type: "button",
      id: "previous",
      textContent: "‹",
      title: "Previous answer (k)",
      disabled: place <= 0,
      onclick: () => step(-1),
    }),
    el("button", {
      type: "button",
      id: "next",
      textContent: "›",
      title: "Next answer (j)",
      disabled: place < 0 || place + 1 >= items.length,
      onclick: () => step(1),
    }),
    outcomeTag(item),
    el("strong", {
      textContent: `Iteration ${item.iteration}, answer ${item.sample}${data.runs.length > 1 ? `, ${data.runs[item.run].label}` : ""}`,
    }),
    el("button", {
      type: "button",
      id: "jump",
      textContent: "Where q falls the most (b)",
      disabled: !fall,
      onclick: () => pointAt(fall.index, { scroll: true, save: true }),
    }),
    el("button", { type: "button", textContent: "Its question", onclick: () => go({ view: "rollouts", item: item.index }) }),
  );
  const question = el(
    "div",
    { className: "panel" },
    head,
    mathText(item.prompt, "", "div"),
    facts([["gold answer", mathText(item.gold_answer)], ...verdictFacts(item), ["pass rate", num(item.pass_rate, 3)]], "wide"),
  );
  if (!tokens) return [question, el("p", { className: "note", textContent: "No tokens of this answer were written." })];
  return [
    question,
    el("div", { className: "panel under" }, legend(state), tokenText(state), inspector()),
    ...(tokens.scored
      ? [
          el(
            "div",
            { className: "panel chart under" },
            el("h3", { textContent: "q, the believed chance of a correct answer" }),
            fallSentence(),
            el("div", { id: "q-chart" }),
          ),
        ]
      : []),
    el("h2", { textContent: "As it reads" }),
    el("div", { className: "panel" }, answerText(item.response)),
  ];
}

function legend(state) {
  const { item, tokens } = shown;
  if (!tokens.scored)
    return el("p", { className: "note small", textContent: "Not trained on in its iteration: no scores and no weights." });
  const name = item.reward > 0 ? "w+" : "w−";
  const bar = el("span", { className: "legend-bar" });
  const rgb = item.reward > 0 ? "--good" : "--bad";
  bar.style.background = `linear-gradient(to right, rgb(var(${rgb}) / 0), rgb(var(${rgb}) / ${ALPHA}))`;
  const [low, high] = span(state);
  return el(
    "p",
    { className: "note small" },
    `Tint: ${name} from ${num(low, 3)}`,
    bar,
    `to ${num(high, 3)}. `,
    el("button", {
      type: "button",
      id: "stretch",
      "aria-pressed": String(Boolean(state.stretch)),
      textContent: state.stretch ? "0 to 1" : "Stretch to this answer",
      onclick: () => go({ stretch: state.stretch ? undefined : 1 }),
    }),
  );
}

const ALPHA = 0.75; // of the tint of weight 1

/** Returns the weights that are shown as none and as full tint. */
function span(state) {
  const weights = shown.tokens.token_weight;
  if (!state.stretch) return [0, 1];
  const low = weights.reduce((a, b) => Math.min(a, b), 1),
    high = weights.reduce((a, b) => Math.max(a, b), 0);
  return high > low ? [low, high] : [0, 1];
}

function tokenText(state) {
  const { item, tokens, texts, fall } = shown;
  const [low, high] = tokens.scored ? span(state) : [0, 1];
  const tint = color(item.reward > 0 ? "--good" : "--bad"); // read once: an answer may have 16,000 tokens
  shown.spans = texts.map((text, i) => {
    const node = appendText(el("span", { className: i === fall?.index ? "t fall" : "t" }), text || "∅");
    node.dataset.i = i;
    const weight = tokens.token_weight[i];
    const share = Math.min(1, Math.max(0, (weight - low) / (high - low)));
    if (tokens.scored) node.style.backgroundColor = `rgb(${tint} / ${(ALPHA * share).toFixed(3)})`;
    return node;
  });
  const point = (event, save) => {
    const node = event.target.closest?.(".t");
    if (node) pointAt(Number(node.dataset.i), { save });
  };
  return el(
    "div",
    {
      className: "tokens model",
      id: "tokens",
      dir: "auto",
      tabIndex: 0,
      "aria-label": "Tokens of the answer",
      onmouseover: (event) => point(event, false),
      onclick: (event) => point(event, true),
    },
    shown.spans,
  );
}

function inspector() {
  return el(
    "div",
    { className: "inspect", id: "inspect", "aria-live": "polite" },
    el("div", {}, el("span", { textContent: "Point at a token, or press ← or →." })),
  );
}

/** Shows the numbers of a token; `save` keeps it in the address, `scroll` brings it into sight. */
function pointAt(index, { save = false, scroll = false } = {}) {
  if (!shown?.tokens || index === null || !(index in shown.spans)) return;
  shown.spans[shown.at]?.classList.remove("at");
  shown.at = index;
  shown.spans[index].classList.add("at");
  if (scroll) shown.spans[index].scrollIntoView({ block: "center" });
  document.getElementById("inspect").replaceChildren(...numbersOf(index));
  if (shown.plot)
    shown.plot.setCursor({ left: shown.plot.valToPos(index, "x"), top: shown.plot.valToPos(shown.tokens.q[index], "y") }, false);
  if (save) remember({ item: shown.item.index, token: index });
}

function numbersOf(index) {
  const { tokens, texts, data, fall } = shown;
  const cell = (name, value) => el("div", { "data-name": name }, el("span", { textContent: name }), el("b", {}, value));
  const cells = [
    cell("token", modelText(JSON.stringify(texts[index]))),
    cell("place", `${index} of ${texts.length}`),
    cell("id", String(data.ids[tokens.piece[index]])),
  ];
  for (const [name, value] of NUMBERS) cells.push(cell(name, value(tokens, index)));
  if (fall?.index === index) cells.push(cell("largest fall of q", `${num(fall.before)} → ${num(fall.after)}`));
  return cells;
}

function fallSentence() {
  const { fall, texts } = shown;
  if (!fall) return el("p", { className: "note", textContent: "One token: q cannot fall." });
  return el(
    "p",
    { id: "fall" },
    "q falls the most at token ",
    el("strong", { textContent: String(fall.index) }),
    " ",
    modelText(JSON.stringify(texts[fall.index])),
    `: ${num(fall.before)} → ${num(fall.after)}.`,
  );
}

function drawQ(tokens, place) {
  const xs = Array.from(tokens.q, (_, i) => i);
  const mark = (plot) => {
    if (!shown?.fall) return;
    const x = plot.valToPos(shown.fall.index, "x", true);
    plot.ctx.save();
    plot.ctx.strokeStyle = `rgb(${color("--bad")})`;
    plot.ctx.setLineDash([4, 3]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, plot.bbox.top);
    plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
    plot.ctx.stroke();
    plot.ctx.restore();
  };
  const click = (plot) =>
    plot.over.addEventListener("click", () => plot.cursor.idx !== null && pointAt(plot.cursor.idx, { scroll: true, save: true }));
  return draw(
    place,
    [xs, Array.from(tokens.q)],
    [
      { label: "token" },
      { label: "q", stroke: palette(0), width: 1.5, points: { show: xs.length < 80 }, value: (_, v) => num(v) },
    ],
    { sync: false, height: 170, hooks: { ready: [click], draw: [mark] } },
  );
}
