// Training and evaluation jobs: the list, and the curves of several of them over each other.

import { all, path, useGet } from "./api.js";
import { Chart } from "./chart.js";
import { curvesOf, isOver, smooth, turningPoint, useLines } from "./curves.js";
import { ago, duration, fixed, percent } from "./format.js";
import { html, useEffect, useState } from "./html.js";
import { Check, Demo, Empty, Field, Problem, State, Table, Waiting } from "./parts.js";

const FIRST = 4; // runs whose curves are shown at the start

/** The version a training makes, or what an evaluation judges. */
export function nameOf(job) {
  if (job.kind === "train") return `${job.repo}/${job.version}`;
  return `${job.task ?? "evaluation"} of ${job.adapter ?? "the base"}`;
}

/** The share of the work that is done, from whatever the job reports; null where it does not say. */
export function shareOf(job) {
  const { progress } = job;
  if (!progress) return null;
  const done = progress.step ?? progress.done;
  const total = progress.steps ?? progress.total;
  return done !== undefined && total ? Math.min(done / total, 1) : null;
}

export function secondsOf(job) {
  if (!job.started) return null;
  return (job.finished ?? Date.now() / 1000) - job.started;
}

export function Progress({ job }) {
  const share = shareOf(job);
  if (isOver(job.state)) return null;
  if (share === null) return html`<span class="muted">${job.stage !== job.state ? job.stage : ""}</span>`;
  return html`<progress value=${share} max="1" aria-label=${`Progress of ${nameOf(job)}`}></progress> <span class="muted">${percent(share, 0)}${job.progress.seconds_left ? `, ${duration(job.progress.seconds_left)} left` : ""}</span>`;
}

/** The series of one run: training thin, held-out thick, both of one colour. */
export function seriesOf(name, colour, lines, { train, validation, weight }) {
  const curves = curvesOf(lines);
  const series = [];
  if (train) series.push({ label: `${name} train`, colour, thin: true, points: smooth(curves.train, weight), version: weight });
  if (validation) series.push({ label: `${name} held-out`, colour, points: curves.validation, points_shown: true });
  return { curves, series };
}

/** What is shown of curves: which, how smooth, on which scale. */
export function CurveControls({ view, onView }) {
  return html`
    <div class="row">
      <${Check} label="Train" checked=${view.train} onValue=${(train) => onView({ ...view, train })} />
      <${Check} label="Held-out" checked=${view.validation} onValue=${(validation) => onView({ ...view, validation })} />
      <${Check} label="Log scale" checked=${view.log} onValue=${(log) => onView({ ...view, log })} />
      <${Field} label=${`Smoothing of train ${fixed(view.weight, 2)}`}>
        ${(id) => html`<input id=${id} type="range" min="0" max="0.98" step="0.02" value=${view.weight} onInput=${(event) => onView({ ...view, weight: Number(event.currentTarget.value) })} />`}
      <//>
    </div>`;
}

export const FIRST_VIEW = { train: true, validation: true, log: false, weight: 0.6 };

function Overlay({ jobs }) {
  const lines = useLines(jobs);
  const [view, setView] = useState(FIRST_VIEW);
  const runs = jobs.map((job, i) => ({ job, colour: i, ...seriesOf(nameOf(job), i, lines.get(job.id) ?? [], view) }));
  if (!runs.some((run) => run.curves.train.length)) return html`<p class="muted">No learning curve yet: choose runs in the table, or wait for the first steps.</p>`;
  const said = runs.map((run) => `${nameOf(run.job)} held-out ${fixed(run.curves.validation.at(-1)?.[1])}`).join("; ");
  const rows = runs.filter((run) => run.curves.train.length);
  return html`
    <${CurveControls} view=${view} onView=${setView} />
    <${Chart} series=${runs.flatMap((run) => run.series)} log=${view.log} xLabel="step" summary=${`Learning curves. ${said}`} />
    <${Table} caption="Losses of the runs in the chart" rows=${rows} columns=${[
      { title: "Run", cell: (run) => html`<span class=${`swatch s${(run.colour % 6) + 1}`}></span>${nameOf(run.job)}` },
      { title: "Step", number: true, cell: (run) => run.curves.train.at(-1)[0] },
      { title: "Train loss", number: true, cell: (run) => fixed(run.curves.train.at(-1)[1]) },
      { title: "Held-out loss", number: true, cell: (run) => fixed(run.curves.validation.at(-1)?.[1]) },
      { title: "Least held-out", number: true, cell: (run) => fixed(least(run.curves.validation)?.[1]) },
      { title: "Over-fitting", cell: (run) => verdict(run.curves.validation) },
    ]} />`;
}

const least = (points) => points.reduce((best, one) => (!best || one[1] < best[1] ? one : best), null);

export function verdict(points) {
  const turned = turningPoint(points);
  if (turned) return html`<span class="state state-queued">turned at step ${turned[0]}</span>`;
  return points.length < 3 ? html`<span class="muted">too early to say</span>` : "none seen";
}

export function Runs() {
  const { data, error } = useGet("api/jobs?limit=100", 2);
  const [older, setOlder] = useState({ items: [], next: null });
  const [chosen, setChosen] = useState(null);
  const items = [...(data?.items ?? []), ...older.items.filter((one) => !data?.items.some((other) => other.id === one.id))];
  useEffect(() => {
    if (chosen === null && items.length) setChosen(items.filter((job) => job.kind === "train").slice(0, FIRST).map((job) => job.id));
  }, [items.length]);
  const picked = items.filter((job) => chosen?.includes(job.id));
  const choose = (job, yes) => setChosen(yes ? [...(chosen ?? []), job.id] : chosen.filter((id) => id !== job.id));
  const more = async () => setOlder({ items: await all(`api/jobs?limit=100`), next: null });
  return html`
    <div class="head"><h1 tabindex="-1">Runs</h1><div class="push"><a class="button primary" href="#/runs/new">New run</a></div></div>
    <${Problem} error=${error} />
    ${!data && !error ? html`<${Waiting} what="runs" />` : null}
    ${data && !items.length ? html`
      <${Empty} title="Nothing was trained here yet">
        <p>A run turns rows of yours (JSON lines, CSV or Parquet) into an adapter. <a href="#/runs/new">Start one from a file</a>: you see the rendered prompts and what is wrong with the data before anything starts.</p>
        <${Demo} />
      <//>` : null}
    ${items.length ? html`
      <${Overlay} jobs=${picked} />
      <${Table} caption="Runs" rows=${items} rowKey=${(job) => job.id} columns=${[
        { title: "Curve", cell: (job) => job.kind === "train" && html`<input type="checkbox" aria-label=${`Curve of ${nameOf(job)}`} checked=${chosen?.includes(job.id)} onChange=${(event) => choose(job, event.currentTarget.checked)} />` },
        { title: "Run", cell: (job) => html`<a href=${path`#/runs/${job.id}`}>${nameOf(job)}</a>` },
        { title: "Kind", cell: (job) => job.kind },
        { title: "State", cell: (job) => html`<${State} state=${job.state} />` },
        { title: "Progress", cell: (job) => html`<${Progress} job=${job} />` },
        { title: "Loss", number: true, cell: (job) => fixed(job.result?.loss ?? job.progress?.loss) },
        { title: "Held-out", number: true, cell: (job) => fixed(job.result?.validation_loss ?? job.progress?.validation_loss) },
        { title: "Dataset", cell: (job) => job.dataset },
        { title: "Took", number: true, cell: (job) => duration(secondsOf(job)) },
        { title: "Created", number: true, cell: (job) => ago(job.created) },
        { title: "By", cell: (job) => job.created_by },
      ]} />
      ${data?.next && !older.items.length ? html`<div><button type="button" onClick=${more}>Show older runs</button></div>` : null}` : null}`;
}
