// Health: every alarm, what to do about it, and where the telling numbers stand.

const ADVICE = [
  [
    /unverified/,
    "Rollouts, verdict unverified, shows the reasons: a judge that is down, a format the rules cannot read, or a time limit too short. Mend that and start again: the run goes on from its checkpoint.",
  ],
  [
    /entropy/,
    "The policy becomes sure of itself too fast. Lower the policy's rate or the positive factor, raise oreal.kl_coefficient, or go back to an earlier checkpoint.",
  ],
  [
    /reward|pass_rate|collapse/,
    "The pass rate falls: compare answers before and after in Rollouts. Go back to the checkpoint before the fall and lower the rate; look whether the verifier began to refuse a format.",
  ],
  [
    /mismatch/,
    "Policy and rollout engine score the same tokens differently: run check-sync. In bf16 a small rise is rounding; a jump is weights that did not arrive, or another precision.",
  ],
  [
    /straggler|slow|wait|throughput|time/,
    "One rank or one phase holds up the others: look at the phase times, at the judge's queue and at that node's clocks and disks.",
  ],
  [
    /grad|finite|skipped|nan|inf/,
    "A loss or a gradient was not finite and its step was refused. Rare ones are harmless; several in a row mean a rate too high or a broken batch, which recorded/ holds.",
  ],
  [/truncated|length/, "Answers run into the length limit: raise sampling.max_new_tokens, or see in Rollouts whether they loop."],
  [/kl/, "The policy moves away from the reference: raise oreal.kl_coefficient or lower the rate."],
  [
    /auc|token_rm|calibration/,
    "The token reward model cannot tell right from wrong: its weights are noise. Raise its rate, freeze the policy for longer, or train without it (oreal.token_weights.kind=none).",
  ],
];

const TELLING = [
  ["rollout/pass_rate", "pass rate"],
  ["rollout/nontrivial_share", "questions that teach"],
  ["rollout/unverified_share", "unverified share"],
  ["rollout/truncated_share", "truncated share"],
  ["oreal/entropy", "entropy"],
  ["oreal/kl_k3", "KL to the reference"],
  ["rollout/mismatch_mean", "mismatch, mean"],
  ["rollout/mismatch_max", "mismatch, largest"],
  ["oreal/grad_norm", "gradient norm of the policy"],
  ["token_rm/grad_norm", "gradient norm of the token reward model"],
  ["token_rm/auc", "AUC of the token reward model"],
  ["oreal/skipped_iterations", "iterations without a step"],
  ["oreal/skipped_steps", "refused steps"],
  ["time/iteration_s", "seconds an iteration"],
  ["memory/device_used_gib", "GPU memory, GiB"],
  ["memory/host_gib", "host memory, GiB"],
];

function health(main, data) {
  for (const run of data.runs) {
    main.append(el("h2", { textContent: data.runs.length > 1 ? `Alarms of ${run.label}` : "Alarms" }));
    if (!run.alarms.length) main.append(el("p", { className: "note", textContent: "The run raised no alarm." }));
    main.append(...alarmsByKind(run).map(([kind, alarms]) => alarmPanel(run, kind, alarms)));
    main.append(el("h2", { textContent: "Where the telling numbers stand" }), standing(run));
    main.append(...leftBehind(run));
  }
}

/** Lists what else lies in the run's folder, with links where the page knows where that is. */
function leftBehind(run) {
  return Object.entries(run.left)
    .filter(([, paths]) => paths.length)
    .flatMap(([kind, paths]) => [
      el("h2", { textContent: kind[0].toUpperCase() + kind.slice(1) }),
      el("ul", { className: "panel paths" }, paths.map((path) => el("li", {}, linkTo(run, path)))),
    ]);
}

function linkTo(run, path) {
  if (run.place === undefined) return path;
  const href = `./${run.place}/${path}`.split("/").map(encodeURIComponent).join("/");
  return el("a", { href, textContent: path });
}

function alarmsByKind(run) {
  const kinds = new Map();
  for (const alarm of run.alarms) kinds.set(alarm.kind, [...(kinds.get(alarm.kind) ?? []), alarm]);
  return [...kinds.entries()];
}

/** Says how many alarms a run raised, and how many of them are on. */
function alarmCount(run) {
  const all = run.alarms.length,
    on = run.alarms.filter((alarm) => alarm.ended === null).length;
  if (!all) return "No alarm";
  return `${all} alarm${all > 1 ? "s" : ""}${on ? `, ${on} ${run.finished ? "to the end" : "on"}` : ", all over"}`;
}

function alarmPanel(run, kind, alarms) {
  const more = ADVICE.find(([pattern]) => pattern.test(kind))?.[1];
  const last = run.train.iteration?.at(-1);
  const rows = alarms.map((alarm) => {
    const until = alarm.ended === null ? (run.finished ? "the end" : "still on") : String(alarm.ended);
    const look = () =>
      go({
        view: "rollouts",
        run: data.runs.length > 1 ? data.runs.indexOf(run) : undefined,
        from: alarm.iteration,
        to: alarm.ended ?? last,
        item: undefined,
      });
    return el(
      "tr",
      {},
      el(
        "td",
        {},
        el("button", {
          type: "button",
          textContent: `${alarm.iteration} to ${until}`,
          title: "Answers of these iterations",
          onclick: look,
        }),
      ),
      el("td", { textContent: num(alarm.value) }),
      el("td", { textContent: num(alarm.bound) }),
      el("td", { textContent: DOES[alarm.action] ?? String(alarm.action) }),
    );
  });
  return el(
    "section",
    { className: "panel alarm" },
    el("h3", {}, modelText(kind)),
    el("p", {}, modelText(alarms.at(-1).advice, "prose"), "."),
    more ? el("p", { className: "muted", textContent: more }) : null,
    el(
      "table",
      { className: "plain" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ["iterations", "value", "bound", "did"].map((name) => el("th", { textContent: name })),
        ),
      ),
      el("tbody", {}, rows),
    ),
  );
}

const DOES = { alarm: "said so", skip: "took no step", stop: "ended the run" };

function standing(run) {
  const rows = TELLING.filter(([name]) => run.train[name]).map(([name, label]) => {
    const values = run.train[name].map((v, i) => [v, run.train.iteration[i]]).filter(([v]) => v !== null);
    if (!values.length) return null;
    const sorted = values.toSorted((a, b) => a[0] - b[0]);
    const cells = [values[0], sorted[0], sorted.at(-1), values.at(-1)];
    return el(
      "tr",
      {},
      el("td", { textContent: label, title: name }),
      cells.map(([v, at]) => el("td", { textContent: num(v), title: `iteration ${at}` })),
    );
  });
  return el(
    "div",
    { className: "panel" },
    el(
      "table",
      { className: "plain" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ["", "first", "least", "most", "last"].map((name) => el("th", { textContent: name })),
        ),
      ),
      el("tbody", {}, rows.filter(Boolean)),
    ),
  );
}
