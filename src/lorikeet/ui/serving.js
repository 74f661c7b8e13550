// What the engine does at this moment: throughput, latencies, memory, and every adapter it knows.

import { stream, useGet } from "./api.js";
import { Chart } from "./chart.js";
import { ago, bytes, count, duration, fixed, percent } from "./format.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Empty, Facts, Problem, State, Table, Waiting } from "./parts.js";

const KEPT = 600; // seconds of the charts
const AGAIN = 2000; // ms

/** `{now, history, error}`: history holds what has come since the page is shown, behind what the server remembers. */
function useServing() {
  const [state, setState] = useState({ now: null, history: [], error: null });
  const history = useRef([]);
  useEffect(() => {
    const controller = new AbortController();
    const { signal } = controller;
    const take = (message) => {
      const { now } = message;
      const t = message.t ?? Date.now() / 1000;
      if (message.history && !history.current.length) history.current = message.history.map((one) => ({ t: one.t, tokens_per_second: one.tokens_per_second ?? one.tokens }));
      history.current = [...history.current.filter((one) => one.t > t - KEPT && one.t < t), { t, ...now }];
      setState({ now, history: history.current, error: null });
    };
    const follow = async () => {
      while (!signal.aborted) {
        try {
          for await (const message of stream("GET", "api/serving/stream", undefined, { signal })) take(message);
        } catch (error) {
          if (error.name === "AbortError") return;
          setState((before) => ({ ...before, error }));
          if ([401, 403, 404].includes(error.status)) return;
        }
        await new Promise((done) => setTimeout(done, AGAIN));
      }
    };
    follow();
    return () => controller.abort();
  }, []);
  return state;
}

export function Serving() {
  const { now, history, error } = useServing();
  const info = useGet("api/info");
  const line = (label, colour, pick) => ({ label, colour, points: history.flatMap((one) => (pick(one) === undefined || pick(one) === null ? [] : [[one.t, pick(one)]])) });
  return html`
    <div class="head"><h1 tabindex="-1">Serving</h1>${info.data ? html`<span class="muted">${info.data.base.name}, ${count(info.data.base.parameters)} parameters, context ${count(info.data.base.context)}, ${info.data.dtype} on ${info.data.device}</span>` : null}</div>
    <${Problem} error=${error} />
    ${!now && !error ? html`<${Waiting} what="what is going on" />` : null}
    ${now ? html`
      <${Facts} class="figures" items=${[
        ["Throughput", `${fixed(now.tokens_per_second, 1)} tokens/s`],
        ["Running", count(now.requests_running)],
        ["Waiting", count(now.requests_waiting)],
        ["First token p50", duration(now.ttft?.p50)], ["First token p95", duration(now.ttft?.p95)],
        ["Between tokens p50", duration(now.itl?.p50)], ["Between tokens p95", duration(now.itl?.p95)],
        ["Keys and values", `${percent(now.kv_used, 0)} used`],
      ]} />
      <div class="halves">
        <section class="stack" aria-label="Throughput"><h2>Tokens per second</h2>
          <${Chart} series=${[line("tokens/s", 0, (one) => one.tokens_per_second)]} height=${180} xLabel="time" xTime summary=${`Throughput, now ${fixed(now.tokens_per_second, 1)} tokens per second`} />
        </section>
        <section class="stack" aria-label="Latency"><h2>Latency of the last minute, ms</h2>
          <${Chart} series=${[line("first token p95", 1, (one) => one.ttft?.p95 && 1000 * one.ttft.p95), line("between tokens p95", 2, (one) => one.itl?.p95 && 1000 * one.itl.p95)]} height=${180} xLabel="time" xTime summary=${`Latency, first token p95 ${duration(now.ttft?.p95)}, between tokens p95 ${duration(now.itl?.p95)}`} />
          <p class="row"><span><span class="swatch s2"></span>first token p95</span><span><span class="swatch s3"></span>between tokens p95</span></p>
        </section>
      </div>
      <h2>Adapters</h2>
      ${now.adapters.length ? html`
        <${Table} caption="Adapters" rows=${now.adapters} rowKey=${(one) => one.name} columns=${[
          { title: "Adapter", wide: true, cell: (one) => one.name },
          { title: "Lives", cell: (one) => html`<${State} state=${one.tier} />` },
          { title: "Running", number: true, cell: (one) => count(one.running) },
          { title: "Waiting", number: true, cell: (one) => count(one.waiting) },
          { title: "Requests", number: true, cell: (one) => count(one.hits) },
          { title: "Rank", number: true, cell: (one) => one.rank ?? "–" },
          { title: "Size", number: true, cell: (one) => bytes(one.bytes) },
          { title: "Last used", number: true, cell: (one) => ago(one.last_used) },
        ]} />` : html`<${Empty} title="No adapter was asked for yet"><p>An adapter takes memory from its first request on. <a href="#/playground">Ask one in the playground</a>.</p><//>`}` : null}`;
}
