// Every task with what was judged on it: the base, the adapters, the classical baseline; intervals and cost.

import { useGet } from "./api.js";
import { bytes, coreSeconds, count, duration, percent } from "./format.js";
import { html, useState } from "./html.js";
import { Choice, Demo, Empty, Interval, Problem, Select, Table, Waiting } from "./parts.js";

const FEW = 10; // adapters of a task, until all of it is asked for
const keyOf = (task) => JSON.stringify([task.task, task.metric]); // a task may be judged by several metrics
const milliseconds = (value) => duration(value === undefined || value === null ? null : value / 1000);
const intervalText = ({ ci }) => (ci ? `${percent(ci[0])} to ${percent(ci[1])}` : "–");

function rowsOf(task) {
  const adapters = (task.adapters ?? []).map((one) => ({ name: one.ref, ...one }));
  adapters.sort((a, b) => b.score - a.score);
  const rows = adapters.map((one) => ({ ...one, adapter: true }));
  if (task.baseline) rows.push({ name: "classical baseline", ...task.baseline });
  if (task.base) rows.push({ name: "base", ...task.base });
  return rows;
}

/** An adapter whose interval lies above the base's is better than it beyond chance. */
function Verdict({ row, task }) {
  if (!row.adapter || !row.ci || !task.base?.ci) return "";
  return row.ci[0] > task.base.ci[1] ? html`<span class="tag accent">above the base</span>` : html`<span class="tag">not told from the base</span>`;
}

const COLUMNS = (task) => [
  { title: "Model", wide: true, cell: (row) => row.name },
  { title: "Score", number: true, cell: (row) => percent(row.score) },
  { title: "95% interval", number: true, cell: intervalText },
  { title: "0 to 100%", cell: (row) => html`<${Interval} score=${row.score} low=${row.ci?.[0]} high=${row.ci?.[1]} muted=${!row.adapter} />` },
  { title: "Against the base", cell: (row) => html`<${Verdict} row=${row} task=${task} />` },
  { title: "Training", number: true, cell: (row) => duration(row.train_seconds) },
  { title: "Core-seconds", number: true, cell: (row) => coreSeconds(row.core_seconds) },
  { title: "Size", number: true, cell: (row) => bytes(row.adapter_bytes) },
  { title: "Latency p50", number: true, cell: (row) => milliseconds(row.p50_ms) },
  { title: "p95", number: true, cell: (row) => milliseconds(row.p95_ms) },
];

function Overview({ tasks, onTask }) {
  const best = (task) => rowsOf(task).find((row) => row.adapter);
  const several = (name) => tasks.filter((task) => task.task === name).length > 1;
  return html`<${Table} caption="All tasks" rows=${tasks} rowKey=${keyOf} columns=${[
    { title: "Task", wide: true, cell: (task) => html`<button type="button" class="link" onClick=${() => onTask(task.task)}>${task.task}</button>${several(task.task) ? html` <span class="muted">${task.metric}</span>` : null}` },
    { title: "Best adapter", number: true, cell: (task) => percent(best(task)?.score) },
    { title: "Base", number: true, cell: (task) => percent(task.base?.score) },
    { title: "Baseline", number: true, cell: (task) => percent(task.baseline?.score) },
    { title: "0 to 100%", cell: (task) => html`<${Interval} score=${best(task)?.score} low=${best(task)?.ci?.[0]} high=${best(task)?.ci?.[1]} />` },
    { title: "95% interval", number: true, cell: (task) => (best(task) ? intervalText(best(task)) : "–") },
    { title: "Metric", cell: (task) => task.metric },
    { title: "Rows", number: true, cell: (task) => count(task.n) },
    { title: "Core-seconds", number: true, cell: (task) => coreSeconds(best(task)?.core_seconds) },
    { title: "Latency p50", number: true, cell: (task) => milliseconds(best(task)?.p50_ms) },
    { title: "Which", cell: (task) => best(task)?.name ?? "–" },
  ]} />`;
}

/** A task with its best adapters, or with all of them. */
function Results({ task, onTask }) {
  const left = (task.judged ?? 0) - (task.adapters ?? []).length;
  return html`
    <section class="stack" aria-label=${`${task.task}, ${task.metric}`}>
      <h2>${task.task} <span class="muted">${task.metric}, ${count(task.n)} rows</span></h2>
      <${Table} caption=${`Results of ${task.task}, ${task.metric}`} rows=${rowsOf(task)} rowKey=${(row) => row.name} columns=${COLUMNS(task)} />
      ${left > 0 ? html`<div class="row"><button type="button" class="small" aria-label=${`All ${count(task.judged)} adapters of ${task.task}`} onClick=${() => onTask(task.task)}>All ${count(task.judged)} adapters</button></div>` : null}
    </section>`;
}

export function Leaderboard() {
  const { data, error } = useGet(`api/leaderboard?adapters=${FEW}`, 5);
  const [view, setView] = useState("all");
  const [chosen, setChosen] = useState("");
  const whole = useGet(view === "tasks" && chosen ? `api/leaderboard?${new URLSearchParams({ task: chosen })}` : null, 5);
  const tasks = data?.tasks ?? [];
  const names = [...new Set(tasks.map((task) => task.task))];
  const onTask = (name) => { setView("tasks"); setChosen(name); };
  const shown = chosen ? whole.data?.tasks ?? [] : tasks;
  return html`
    <div class="head"><h1 tabindex="-1">Leaderboard</h1>
      ${tasks.length ? html`<${Choice} label="View" value=${view} options=${[["all", "Best of each task"], ["tasks", "Everything"]]} onValue=${setView} />` : null}
      ${view === "tasks" && names.length > 1 ? html`<div class="push"><${Select} label="Task" value=${chosen} options=${[["", `all ${count(names.length)}`], ...names.map((name) => [name, name])]} onValue=${setChosen} /></div>` : null}
    </div>
    <${Problem} error=${error ?? whole.error} />
    ${!data && !error ? html`<${Waiting} what="the results" />` : null}
    ${data && !tasks.length ? html`
      <${Empty} title="Nothing was judged yet">
        <p>An evaluation judges an adapter beside the base, on rows it has not seen, and says how sure that is. Give a run test rows, or start one: <code>lorikeet eval recipe.yaml</code>.</p>
        <${Demo} />
      <//>` : null}
    ${tasks.length && view === "all" ? html`<${Overview} tasks=${tasks} onTask=${onTask} />` : null}
    ${tasks.length ? html`<p class="hint">95% intervals: percentile bootstrap over the test rows. Core-seconds: the CPU time that training used, of all its attempts. Latency: from question to last token while it was judged, with 32 questions under way.</p>` : null}
    ${view === "tasks" && chosen && !whole.data && !whole.error ? html`<${Waiting} what=${chosen} />` : null}
    ${tasks.length && view === "tasks" ? shown.map((task) => html`<${Results} key=${keyOf(task)} task=${task} onTask=${onTask} />`) : null}`;
}
