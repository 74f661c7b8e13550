// One job: its curves as they grow, timeline, log, cost, recipe; to be canceled, resumed, tried.

import { call, path, useAction } from "./api.js";
import { Chart } from "./chart.js";
import { isOver, turningPoint, useJob } from "./curves.js";
import { bytes, coreSeconds, count, duration, fixed, moment, number, percent, value } from "./format.js";
import { html, useLayoutEffect, useRef, useState } from "./html.js";
import { Confirm, Facts, Interval, Problem, State, Table, Waiting } from "./parts.js";
import { CurveControls, FIRST_VIEW, Progress, nameOf, secondsOf, seriesOf } from "./runs.js";

function Curves({ job, lines }) {
  const [view, setView] = useState(FIRST_VIEW);
  const { curves, series } = seriesOf(nameOf(job), 0, lines, view);
  const turned = turningPoint(curves.validation);
  if (!curves.train.length) return html`<p class="muted">${isOver(job.state) ? "This run has no learning curve." : "The curve begins with the first step."}</p>`;
  return html`
    <section class="stack" aria-label="Learning curve">
      <${CurveControls} view=${view} onView=${setView} />
      <${Chart}
        series=${series.map((one) => ({ ...one, label: one.label.replace(`${nameOf(job)} `, "") }))} log=${view.log} xLabel="step" height=${300}
        marks=${turned ? [{ x: turned[0], label: `held-out turned at ${turned[0]}` }] : []}
        summary=${`Learning curve: train loss ${fixed(curves.train.at(-1)[1])} at step ${curves.train.at(-1)[0]}, held-out ${fixed(curves.validation.at(-1)?.[1])}`} />
      <p class="row"><span><span class="swatch thin s1"></span>train ${fixed(curves.train.at(-1)[1])}</span>${curves.validation.length ? html`<span><span class="swatch s1"></span>held-out ${fixed(curves.validation.at(-1)[1])}</span>` : html`<span class="muted">no held-out rows</span>`}</p>
      ${turned ? html`<p class="note" role="status">Held-out loss turned at step ${turned[0]} (${fixed(turned[1])}) and is ${fixed(curves.validation.at(-1)[1])} now: from there on the run over-fits. Fewer epochs, more dropout or more rows help; with a patience a run stops by itself and keeps its best weights.</p>` : null}
    </section>`;
}

function Cost({ job, lines }) {
  const last = lines.findLast((line) => line.split === "train") ?? {};
  const result = job.result ?? {};
  const seconds = secondsOf(job);
  const share = result.train_seconds ?? last.seconds ?? null;
  const tokens = result.tokens ?? last.tokens ?? null;
  return html`
    <${Facts} items=${[
      ["Wall time", duration(seconds)],
      job.kind === "train" && ["Training", html`${duration(share)}${result.joined > 1 ? html` <span class="muted">its share of a joint run of ${result.joined}</span>` : null}`],
      ["Core-seconds", coreSeconds(result.core_seconds ?? job.progress?.core_seconds)],
      ["Waited", duration(job.started ? job.started - job.created : null)],
      job.kind === "train" && ["Steps", `${count(last.step ?? result.steps)}${job.progress?.steps ? ` of ${count(job.progress.steps)}` : ""}`],
      job.kind === "train" && ["Tokens", count(tokens)],
      job.kind === "train" && ["Tokens per second", tokens && share ? count(tokens / share) : "–"],
      ["Attempts", `${job.attempts ?? 0} of ${job.max_attempts ?? "–"}`],
      job.kind === "train" && ["Learning rate now", number(last.lr)],
      job.memory > 0 && ["Memory asked for", bytes(job.memory)],
      result.adapter_bytes && ["Adapter", bytes(result.adapter_bytes)],
      result.stopped === "early stopping" && ["Stopped early, best at", `${count(result.best_step)} (${fixed(result.best_validation_loss)})`],
    ]} />`;
}

/** What an evaluation found. */
function Judged({ job }) {
  const rows = (job.result?.results ?? []).flatMap((one) => [
    { task: one.task, metric: one.metric, n: one.n, name: "base", score: one.base, ci: one.base_ci },
    ...(one.adapter === null || one.adapter === undefined ? [] : [{ task: one.task, metric: one.metric, n: one.n, name: one.adapter_reference, score: one.adapter, ci: one.adapter_ci }]),
    ...(one.baseline === null || one.baseline === undefined ? [] : [{ task: one.task, metric: one.metric, n: one.n, name: "classical baseline", score: one.baseline, ci: one.baseline_ci }]),
  ]);
  if (!rows.length) return html`<p class="muted">${isOver(job.state) ? "It came to no result." : "The scores come at its end."}</p>`;
  return html`<${Table} caption="Scores" rows=${rows} columns=${[
    { title: "Model", cell: (row) => row.name },
    { title: "Task", cell: (row) => row.task },
    { title: "Metric", cell: (row) => row.metric },
    { title: "Score", number: true, cell: (row) => percent(row.score) },
    { title: "95% interval", number: true, cell: (row) => (row.ci ? `${percent(row.ci[0])} to ${percent(row.ci[1])}` : "–") },
    { title: "0 to 100%", cell: (row) => html`<${Interval} score=${row.score} low=${row.ci?.[0]} high=${row.ci?.[1]} />` },
    { title: "Rows", number: true, cell: (row) => count(row.n) },
  ]} />`;
}

function Timeline({ events }) {
  if (!events.length) return html`<p class="muted">Nothing happened yet.</p>`;
  return html`
    <ol class="timeline" tabindex="0" aria-label="Timeline">
      ${events.map((event) => html`<li key=${event.id}><time title=${moment(event.at)}>${moment(event.at).slice(11)}</time><span><strong>${event.kind}</strong>${event.message ? ` ${event.message}` : ""}${event.kind === "audited" && event.data ? html` <span class="muted">${value({ ...event.data, lengths: null })}</span>` : null}</span></li>`)}
    </ol>`;
}

/** Follows its end until the reader scrolls away from it. */
function Log({ text }) {
  const box = useRef(null);
  const follow = useRef(true);
  useLayoutEffect(() => {
    if (follow.current) box.current.scrollTop = box.current.scrollHeight;
  }, [text]);
  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current;
    follow.current = scrollTop + clientHeight > scrollHeight - 30;
  };
  return html`<pre class="log" ref=${box} tabindex="0" role="log" aria-label="Log" onScroll=${onScroll}>${text || "Nothing was written yet."}</pre>`;
}

export function Recipe({ recipe }) {
  const entries = Object.entries(recipe ?? {}).filter(([, found]) => found !== null && found !== undefined);
  const long = (found) => typeof found === "string" && (found.length > 40 || found.includes("\n"));
  return html`
    <${Facts} items=${entries.filter(([, found]) => !long(found)).map(([name, found]) => [name.replaceAll("_", " "), value(found)])} />
    ${entries.filter(([, found]) => long(found)).map(([name, found]) => html`<div><h3 class="muted">${name.replaceAll("_", " ")}</h3><pre class="code" tabindex="0">${found}</pre></div>`)}`;
}

function Actions({ job, reload }) {
  const [asking, setAsking] = useState(false);
  const [resume, busy, error] = useAction(async () => { await call("POST", path`api/jobs/${job.id}/resume`); reload(); });
  const cancel = () => call("POST", path`api/jobs/${job.id}/cancel`);
  return html`
    <div class="push">
      ${!isOver(job.state) ? html`<button type="button" class="danger" disabled=${job.state === "stopping"} onClick=${() => setAsking(true)}>Cancel</button>` : null}
      ${["errored", "canceled"].includes(job.state) ? html`<button type="button" disabled=${busy} onClick=${resume}>Resume</button>` : null}
      ${job.state === "completed" && job.kind === "train" ? html`
        <a class="button primary" href=${`#/playground?model=${encodeURIComponent(nameOf(job))}`}>Try it</a>
        <a class="button" href=${path`#/adapters/${job.repo}` + `?version=${job.version}`}>Version</a>` : null}
      ${job.kind === "train" ? html`<a class="button" href=${path`#/runs/new?like=${job.id}`}>Start one like it</a>` : null}
    </div>
    <${Problem} error=${error} />
    ${asking ? html`
      <${Confirm} title=${`Cancel ${nameOf(job)}?`} action="Cancel the run" danger work=${cancel} onClose=${(done) => { setAsking(false); if (done) reload(); }}>
        <p>It stops after the step it is at. What it has learned stays in its last checkpoint, from which it can be resumed.</p>
      <//>` : null}`;
}

export function Run({ id }) {
  const { job, events, lines, log, error, reload } = useJob(id);
  if (!job) return html`<h1 tabindex="-1">Run</h1>${error ? html`<${Problem} error=${error} />` : html`<${Waiting} what="the run" />`}`;
  return html`
    <div class="head"><h1 tabindex="-1">${nameOf(job)}</h1><${State} state=${job.state} /><${Progress} job=${job} /><${Actions} job=${job} reload=${reload} /></div>
    ${job.description ? html`<p>${job.description}</p>` : null}
    <${Problem} error=${error} />
    ${job.error ? html`<${Problem} error=${job.error} />` : null}
    <div class="split">
      <div class="stack">
        ${job.kind === "train" ? html`<${Curves} job=${job} lines=${lines} />` : html`<${Judged} job=${job} />`}
        <h2>Log</h2>
        <${Log} text=${log} />
      </div>
      <div class="stack">
        <h2>Cost</h2><${Cost} job=${job} lines=${lines} />
        <h2>Timeline</h2><${Timeline} events=${events} />
        <h2>Recipe</h2>
        <${Recipe} recipe=${{ base: job.base, dataset: job.dataset, ...job.recipe }} />
      </div>
    </div>`;
}
