// The overview: the answers in words, then every curve.

const PASS_BINS = [
  [0, 20],
  [20, 40],
  [40, 60],
  [60, 80],
  [80, 100],
].map(([a, b]) => [`rollout/pass_rate_${a}_${b}_share`, `${a}–${b}%`]);
const QUESTION_KINDS = [
  ["rollout/all_incorrect_share", "none correct"],
  ["rollout/nontrivial_share", "some correct"],
  ["rollout/all_correct_share", "all correct"],
  ["rollout/undecided_share", "undecided"],
];

const SECTIONS = [
  [
    "Learning",
    [
      { title: "Held-out questions", kind: "eval", share: true, names: "rates" },
      {
        title: "Pass rate of the sampled questions",
        share: true,
        names: [["rollout/pass_rate", "pass rate"]],
        meaning:
          "Mean over questions of correct / verified answers; easier questions come less often where data.balance_by_pass_rate is on.",
      },
      {
        title: "Questions by pass rate",
        stacked: PASS_BINS,
        meaning:
          "Share of the questions in each fifth of pass rates: how difficult the iteration's questions were to the policy.",
      },
      { title: "Questions by kind", stacked: QUESTION_KINDS, meaning: "Only questions with some correct answers teach." },
    ],
  ],
  [
    "Losses",
    [
      {
        title: "Policy loss and its parts",
        names: [
          ["oreal/loss", "loss"],
          ["oreal/positive_loss", "positive"],
          ["oreal/negative_loss", "negative"],
          ["oreal/kl_loss", "KL"],
        ],
      },
      { title: "Loss of the token reward model", names: [["token_rm/loss", "loss"]] },
      { title: "Fine-tuning loss", names: [["sft/loss", "loss"]] },
      {
        title: "Gradient norms before clipping",
        log: true,
        names: [
          ["oreal/grad_norm", "policy"],
          ["token_rm/grad_norm", "token reward model"],
          ["sft/grad_norm", "fine-tuning"],
        ],
      },
      {
        title: "Learning rates",
        names: [
          ["oreal/learning_rate", "policy"],
          ["token_rm/learning_rate", "token reward model"],
        ],
      },
    ],
  ],
  [
    "Policy",
    [
      { title: "Entropy, nats a token", names: [["oreal/entropy", "entropy"]] },
      { title: "KL to the reference (k3)", names: [["oreal/kl_k3", "KL"]] },
      {
        title: "Mismatch of policy and rollout engine, nats",
        log: true,
        names: [
          ["rollout/mismatch_mean", "mean"],
          ["rollout/mismatch_max", "largest"],
        ],
        meaning: "|policy - engine| of the same token under the same weights.",
      },
    ],
  ],
  [
    "Answers",
    [
      {
        title: "Length by verdict, tokens",
        names: [
          ["rollout/response_length_correct", "correct"],
          ["rollout/response_length_incorrect", "incorrect"],
          ["rollout/response_length_unverified", "unverified"],
        ],
      },
      {
        title: "Truncated and unverified answers",
        share: true,
        names: [
          ["rollout/truncated_share", "truncated"],
          ["rollout/unverified_share", "unverified"],
        ],
      },
    ],
  ],
  [
    "Token reward model",
    [
      {
        title: "AUC and accuracy",
        names: [
          ["token_rm/auc", "AUC"],
          ["token_rm/accuracy", "accuracy"],
        ],
        meaning: "0.5 is chance.",
      },
      {
        title: "Mean score by verdict",
        names: [
          ["token_rm/score_positive", "correct"],
          ["token_rm/score_negative", "incorrect"],
        ],
      },
      { calibration: true },
      {
        title: "Token weights",
        names: [
          ["token_weight/positive_mean", "w+"],
          ["token_weight/negative_mean", "w-"],
          ["token_weight/positive_zero_share", "w+ = 0"],
          ["token_weight/negative_zero_share", "w- = 0"],
        ],
      },
    ],
  ],
  [
    "Time and memory",
    [
      {
        title: "Seconds an iteration",
        names: [
          ["time/iteration_s", "iteration"],
          ["time/generate_s", "generate"],
          ["time/policy_s", "policy"],
          ["time/token_rm_s", "token_rm"],
          ["time/reference_s", "reference"],
        ],
      },
      { title: "Generated tokens a second", names: [["throughput/generated_tokens_per_s", "tokens/s"]] },
      {
        title: "Memory of the first rank, GiB",
        names: [
          ["memory/device_used_gib", "GPU"],
          ["memory/device_peak_gib", "torch's peak"],
          ["memory/host_gib", "host"],
        ],
      },
    ],
  ],
];

function overview(main, data, state) {
  main.append(...data.runs.map((run, i) => answersOf(run, data, state, i)));
  main.append(el("h2", { textContent: "Where the time went" }), ...data.runs.map(phaseBars));
  const later = [];
  for (const [name, specs] of SECTIONS) {
    const charts = specs.flatMap((spec) => chartsOf(data.runs, spec)).filter(Boolean);
    if (!charts.length) continue;
    main.append(
      el("h2", { textContent: name }),
      el(
        "div",
        { className: "charts" },
        charts.map((chart) => chart.panel),
      ),
    );
    later.push(...charts);
  }
  later.forEach((chart) => chart.make());
  main.append(
    el("p", {
      className: "note small",
      textContent: "Drag over a chart to zoom, double-click to see all again; a click on a label hides its line.",
    }),
  );
}

function chartsOf(runs, spec) {
  if (spec.calibration) return [calibrationChart(runs)];
  if (spec.names === "rates") return [lineChart(runs, { ...spec, names: rateNames(runs) })];
  if (!spec.stacked) return [lineChart(runs, spec)];
  return runs.map((run) =>
    stackedChart(run, { ...spec, names: spec.stacked, title: runs.length > 1 ? `${spec.title}: ${run.label}` : spec.title }),
  );
}

/** Returns the rates that evaluations measured: greedy, and pass@k for whatever k. */
function rateNames(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.eval)))];
  return names
    .filter((name) => /^eval\/(pass_at_\d+|greedy)$/.test(name))
    .map((name) => [name, name.slice(5).replace("pass_at_", "pass@")]);
}

function answersOf(run, data, state, number) {
  const several = data.runs.length > 1;
  const lines = (said) => said.map((text) => el("p", { textContent: text }));
  const alarms = run.alarms.length;
  return el(
    "section",
    { "aria-label": `In short: ${run.label}` },
    several ? el("h2", { textContent: run.label }) : null,
    el(
      "div",
      { className: "answers" },
      el(
        "div",
        { className: "panel", id: `learned-${number}` },
        el("h3", { textContent: "Did it learn?" }),
        el("p", { className: "lead", textContent: run.learned.verdict }),
        lines(run.learned.said),
      ),
      el(
        "div",
        { className: "panel", id: `time-${number}` },
        el("h3", { textContent: "Where did the time go?" }),
        el("p", { className: "lead", textContent: longest(run) }),
        lines(run.time),
      ),
      el(
        "div",
        { className: "panel", id: `stop-${number}` },
        el("h3", { textContent: "Is anything wrong?" }),
        el("p", { className: "lead", textContent: alarmCount(run) }),
        alarms
          ? el("button", { type: "button", textContent: "What to do", onclick: () => go({ view: "health" }) })
          : el("p", { textContent: "The run raised none." }),
        el("p", { className: "muted", textContent: shownShare(run) }),
      ),
    ),
    blamePanel(run, data, number),
  );
}

function longest(run) {
  const total = Object.values(run.phases).reduce((a, b) => a + b, 0);
  const [name, spent] = Object.entries(run.phases)[0] ?? ["–", 0];
  return total ? `${name}, ${percent(spent / total)}` : "–";
}

function shownShare(run) {
  const { written, written_tokens: all, shown, shown_tokens: tokens } = run.transcripts;
  if (!written) return "The run wrote no transcripts.";
  const share = all ? `${percent(tokens / all, tokens < 0.1 * all ? 1 : 0)} of their ${num(all)} tokens` : "no tokens";
  const sample = ", a seeded sample over iterations, verdicts and pass rates; report --iteration N holds all of one";
  return `This page holds ${num(shown)} of ${num(written)} transcripts (${share})${shown < written ? sample : ""}.`;
}

function blamePanel(run, data, number) {
  if (!run.blamed.length) return null;
  return el(
    "div",
    { className: "panel", id: `blamed-${number}`, style: "margin-top:14px" },
    el("h3", { textContent: "Which tokens did the reward model blame?" }),
    el("p", {
      className: "muted",
      textContent: `Wrong answers of the last third of the run in which q, the believed chance of a correct answer, falls the most; q follows a running mean, which moves the most at its start. ${run.reward_model.join(" ")}`,
    }),
    run.blamed.map((index) => blameRow(data.items[index])),
  );
}

function blameRow(item) {
  const [before, own, after] = item.blamed.context;
  return el(
    "div",
    { className: "blame" },
    el(
      "div",
      {},
      "Iteration ",
      String(item.iteration),
      ": ",
      mathText(item.prompt),
      " – answered ",
      modelText(item.extracted ?? "nothing"),
      ", right is ",
      modelText(item.gold_answer),
      ".",
    ),
    el(
      "div",
      {},
      modelText(`…${before}`),
      appendText(el("mark", { className: "model" }), own),
      modelText(`${after}…`),
      ` q falls from ${num(item.blamed.before, 3)} to ${num(item.blamed.after, 3)} at token ${item.blamed.index}; the most weight, ${num(item.blamed.heaviest_weight, 3)}, is on token ${item.blamed.heaviest}, `,
      modelText(JSON.stringify(item.blamed.heaviest_text)),
      ". ",
      el("button", {
        type: "button",
        className: "small",
        textContent: "See its tokens",
        onclick: () => go({ view: "tokens", item: item.index, token: item.blamed.index }),
      }),
    ),
  );
}

const PHASES = ["generate", "policy", "token_rm", "reference", "evaluate", "sync", "verify", "start"];

/** Returns the colour of a phase, the same in every run; those that take little share one. */
function phaseColor(name) {
  const place = PHASES.indexOf(name === "sft" ? "policy" : name);
  return place < 0 ? "var(--line)" : `var(--c${place})`;
}

function phaseBars(run) {
  const phases = Object.entries(run.phases);
  const total = phases.reduce((sum, [, s]) => sum + s, 0);
  if (!total) return null;
  const bar = phases.map(([name, s]) => {
    const part = el("div", { title: `${name}: ${seconds(s)}, ${percent(s / total, 1)}` });
    part.style.width = `${(100 * s) / total}%`;
    part.style.background = phaseColor(name);
    return part;
  });
  const rows = phases.map(([name, s]) => {
    const swatch = el("span", { className: "swatch" });
    swatch.style.background = phaseColor(name);
    return el("li", {}, swatch, name, el("b", { textContent: `${seconds(s)} · ${percent(s / total, 1)}` }));
  });
  return el(
    "div",
    { className: "panel" },
    el("h3", { textContent: `${run.label}: ${seconds(total)}` }),
    el("div", { className: "phase-bar", role: "img", "aria-label": "Phases by share of the time" }, bar),
    el("ul", { className: "phases" }, rows),
  );
}
