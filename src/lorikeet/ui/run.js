// One job: its curves as they grow, timeline, log, cost, recipe; to be canceled, resumed, tried.

import { call, path, useAction } from "./api.js";
import { Chart } from "./chart.js";
import { isOver, turningPoint, useJob } from "./curves.js";
import { count, duration, fixed, moment, number, value } from "./format.js";
import { html, useLayoutEffect, useRef, useState } from "./html.js";
import { Confirm, Facts, Problem, State, Waiting } from "./parts.js";
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
      ${turned ? html`<p class="note" role="status">Held-out loss turned at step ${turned[0]} (${fixed(turned[1])}) and is ${fixed(curves.validation.at(-1)[1])} now: from there on the run over-fits. Fewer epochs, more dropout or more rows help; what is kept is the recipe's early stopping.</p>` : null}
    </section>`;
}

function Cost({ job, lines }) {
  const train = lines.filter((line) => line.split === "train");
  const tokens = train.reduce((sum, line) => sum + (line.tokens ?? 0), 0);
  const cost = job.cost ?? job.result ?? {};
  const seconds = secondsOf(job);
  const share = cost.train_seconds ?? cost.seconds ?? null;
  const learned = cost.tokens ?? (tokens || null);
  return html`
    <${Facts} items=${[
      ["Wall time", duration(seconds)],
      share !== null && ["Its share of a joint run", duration(share)],
      ["Waited", duration(job.started ? job.started - job.created : null)],
      ["Steps", count(train.at(-1)?.step ?? cost.steps)],
      ["Tokens", count(learned)],
      ["Tokens per second", learned && seconds ? count(learned / (share ?? seconds)) : "–"],
      ["Attempts", `${job.attempts ?? 0} of ${job.max_attempts ?? "–"}`],
      ["Last learning rate", train.length ? number(train.at(-1).lr) : "–"],
    ]} />`;
}

function Timeline({ events }) {
  if (!events.length) return html`<p class="muted">Nothing happened yet.</p>`;
  return html`
    <ol class="timeline" tabindex="0" aria-label="Timeline">
      ${events.map((event) => html`<li key=${event.id}><time title=${moment(event.at)}>${moment(event.at).slice(11)}</time><span><strong>${event.kind}</strong>${event.message ? ` ${event.message}` : ""}</span></li>`)}
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
      ${job.state === "completed" && job.repository ? html`
        <a class="button primary" href=${`#/playground?model=${encodeURIComponent(nameOf(job))}`}>Try it</a>
        <a class="button" href=${path`#/adapters/${job.repository}` + `?version=${job.number}`}>Version</a>` : null}
      <a class="button" href=${path`#/runs/new?like=${job.id}`}>Start one like it</a>
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
  const spec = job.spec ?? {};
  const recipe = job.recipe ?? spec.recipe ?? spec;
  return html`
    <div class="head"><h1 tabindex="-1">${nameOf(job)}</h1><${State} state=${job.state} /><${Progress} job=${job} /><${Actions} job=${job} reload=${reload} /></div>
    ${job.description ? html`<p>${job.description}</p>` : null}
    <${Problem} error=${error} />
    ${job.error ? html`<${Problem} error=${job.error} />` : null}
    <div class="split">
      <div class="stack">
        <${Curves} job=${job} lines=${lines} />
        <h2>Log</h2>
        <${Log} text=${log} />
      </div>
      <div class="stack">
        <h2>Cost</h2><${Cost} job=${job} lines=${lines} />
        <h2>Timeline</h2><${Timeline} events=${events} />
        <h2>Recipe</h2>
        <${Recipe} recipe=${{ base: job.base, dataset: job.dataset ?? spec.dataset, ...recipe }} />
      </div>
    </div>`;
}
