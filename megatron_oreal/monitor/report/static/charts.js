// Charts over iterations, by uPlot: values under the pointer, zoom by dragging, one pointer for all.

const HEIGHT = 190;
const plots = new Set();
const shared = uPlot.sync("iteration");

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const palette = (i) => color(`--c${i % 8}`);

/** Ends all charts, before another view is shown. */
function clearPlots() {
  plots.forEach((plot) => plot.destroy());
  plots.clear();
}

/** Fits all charts to their places. */
function fitPlots() {
  plots.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: plot.height }));
}

function axis(extra = {}) {
  return {
    stroke: () => color("--muted"),
    grid: { stroke: () => color("--line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
    ...extra,
  };
}

const yAxis = () => axis({ size: 54, values: (_, splits) => splits.map((v) => (v === null ? "" : num(v, 3))) });

/** Draws a chart into a place; `options` are uPlot's, beyond what all charts have in common. */
function draw(place, data, series, { height = HEIGHT, sync = true, axes, ...options }) {
  const cursor = { drag: { x: true, y: false, setScale: true }, points: { size: 6 }, ...options.cursor };
  if (sync) cursor.sync = { key: shared.key, setSeries: false };
  const plot = new uPlot(
    {
      width: Math.max(place.clientWidth, 240),
      height,
      scales: { x: { time: false } },
      axes: axes ?? [axis({ size: 26 }), yAxis()],
      legend: { live: true },
      ...options,
      cursor,
      series,
    },
    data,
    place,
  );
  plots.add(plot);
  return plot;
}

/** Returns a panel with a title and an explanation for the pointer. */
function chartPanel(title, meaning) {
  const place = el("div", { className: "chart-place" });
  const panel = el(
    "section",
    { className: "panel chart", "aria-label": title },
    el("h3", { textContent: title, title: meaning ?? "" }),
    place,
  );
  return { panel, place };
}

/** Returns the iterations that any run has, and a metric of each run laid out over them. */
function aligned(runs, kind, names) {
  const xs = [...new Set(runs.flatMap((run) => run[kind].iteration ?? []))].sort((a, b) => a - b);
  const rows = runs.flatMap((run, r) =>
    names
      .filter(([name]) => run[kind][name])
      .map(([name, label], m) => {
        const at = new Map(run[kind].iteration.map((x, i) => [x, run[kind][name][i]]));
        return { name, label, run: r, metric: m, values: xs.map((x) => at.get(x) ?? null) };
      }),
  );
  return { xs, rows };
}

/** Returns a panel with lines of metrics over iterations, one a run and metric; null without any. */
function lineChart(runs, { title, meaning, kind = "train", names, log = false, share = false }) {
  const { xs, rows } = aligned(runs, kind, names);
  if (!rows.some((row) => row.values.some((v) => v !== null))) return null;
  const { panel, place } = chartPanel(title, meaning);
  const several = runs.length > 1;
  const series = rows.map((row) => ({
    label: several ? `${runs[row.run].label} ${row.label}` : row.label,
    stroke: palette(several ? row.run : row.metric),
    dash: several && row.metric ? [4 * row.metric, 3] : undefined,
    width: 1.5,
    spanGaps: true,
    points: { show: xs.length < 3 || kind === "eval" },
    value: (_, v) => (share ? percent(v, 1) : num(v)),
  }));
  const positive = rows.every((row) => row.values.every((v) => v === null || v > 0));
  const scales = { x: { time: false }, ...(log && positive ? { y: { distr: 3 } } : {}) };
  const make = () => draw(place, [xs, ...rows.map((row) => row.values)], [{ label: "iteration" }, ...series], { scales });
  return { panel, make };
}

/** Returns a panel with shares that add up, drawn over one another; null without any. */
function stackedChart(run, { title, meaning, names }) {
  const { xs, rows } = aligned([run], "train", names);
  if (!rows.length) return null;
  const { panel, place } = chartPanel(title, meaning);
  const sums = rows.map((_, i) => xs.map((_, x) => rows.slice(0, i + 1).reduce((sum, row) => sum + (row.values[x] ?? 0), 0)));
  const series = rows.map((row, i) => ({
    label: row.label,
    stroke: palette(i),
    fill: palette(i),
    width: 0,
    points: { show: false },
    value: (_, __, ___, x) => percent(x === null ? null : row.values[x], 0),
  }));
  const make = () =>
    draw(place, [xs, ...sums.toReversed()], [{ label: "iteration" }, ...series.toReversed()], {
      scales: { x: { time: false }, y: { range: [0, 1] } },
    });
  return { panel, make };
}

/** Returns a panel with the reward model's predicted against the true share of correct answers. */
function calibrationChart(runs) {
  const known = runs.filter((run) => run.calibration.length);
  if (!known.length) return null;
  const meaning =
    "Answers written out in the last third of the run, in ten equal bins of the predicted probability; the thin line is perfect calibration.";
  const { panel, place } = chartPanel("Calibration of the token reward model", meaning);
  const xs = [...new Set([0, 1, ...known.flatMap((run) => run.calibration.map((bin) => bin.p))])].sort((a, b) => a - b);
  const lines = known.map((run) => xs.map((x) => run.calibration.find((bin) => bin.p === x) ?? null));
  const data = [xs, xs, ...lines.map((line) => line.map((bin) => bin && bin.correct))];
  const series = known.map((run, i) => ({
    label: known.length > 1 ? run.label : "correct",
    stroke: palette(i),
    width: 1.5,
    spanGaps: true,
    points: { show: true, size: 7 },
    value: (_, v, __, x) => (v === null || x === null ? "–" : `${percent(v)} of ${lines[i][x].count}`),
  }));
  const make = () =>
    draw(
      place,
      data,
      [
        { label: "predicted", value: (_, v) => num(v, 3) },
        { label: "perfect", stroke: color("--line"), width: 1, points: { show: false } },
        ...series,
      ],
      {
        sync: false,
        scales: { x: { time: false, range: [0, 1] }, y: { range: [0, 1] } },
      },
    );
  return { panel, make };
}
