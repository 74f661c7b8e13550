// What learning curves are drawn from: metrics lines of jobs, smoothing, and where held-out loss turned.

import { get, path, stream } from "./api.js";
import { useEffect, useRef, useState } from "./html.js";

const TURN = 1.02; // held-out loss this many times its least counts as worse
const AGAIN = 1500; // ms between two looks at a run that goes on
const MOST = 1000; // metrics lines of one answer
const DRAWN = "step,split,loss"; // what a curve needs of one

export const ENDED = ["completed", "errored", "canceled"];
export const isOver = (state) => ENDED.includes(state);

/** Metrics lines -> {train, validation}, each points [step, loss] by step; of lines for one step the last counts. */
export function curvesOf(lines) {
  const found = { train: new Map(), validation: new Map() };
  for (const line of lines) {
    if (typeof line.loss === "number") found[line.split === "train" ? "train" : "validation"].set(line.step, line.loss);
  }
  const sorted = (points) => [...points].sort((a, b) => a[0] - b[0]);
  return { train: sorted(found.train), validation: sorted(found.validation) };
}

/** Exponential moving average without the bias of its start; `weight` of the past from 0 (none) to below 1. */
export function smooth(points, weight) {
  if (!weight) return points;
  let sum = 0;
  let mass = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    mass = weight * mass + (1 - weight);
    return [x, sum / mass];
  });
}

/** The point of least held-out loss when it has got worse since; null while it has not. */
export function turningPoint(points) {
  if (points.length < 3) return null;
  const best = points.reduce((least, one) => (one[1] < least[1] ? one : least));
  const last = points.at(-1);
  return last[0] > best[0] && last[1] > TURN * best[1] ? best : null;
}

/** Metrics lines of several jobs by id, followed while a job goes on. `jobs`: [{id, state}]. */
export function useLines(jobs) {
  const [, redraw] = useState(0);
  const lines = useRef(new Map());
  const states = useRef({});
  states.current = Object.fromEntries(jobs.map((job) => [job.id, job.state]));
  const ids = jobs.map((job) => job.id).join(" ");
  useEffect(() => {
    const controller = new AbortController();
    const follow = async (id) => {
      const own = [];
      let after = 0;
      lines.current.set(id, own);
      while (!controller.signal.aborted) {
        const over = isOver(states.current[id]);
        const items = await linesOf(id, after, DRAWN, controller.signal).catch(() => null);
        if (items?.length) {
          own.push(...items);
          after = items.at(-1).id;
          redraw((turn) => turn + 1);
        }
        if (over && items) return;
        await new Promise((done) => setTimeout(done, AGAIN));
      }
    };
    for (const id of ids.split(" ").filter(Boolean)) follow(id);
    return () => controller.abort();
  }, [ids]);
  return lines.current;
}

/** The metrics lines behind the one with this id, a thousand at a time; `fields` null: all of them. */
async function linesOf(id, after, fields, signal) {
  const wanted = fields === null ? "" : `&fields=${fields}`;
  const lines = [];
  for (;;) {
    const { items } = await get(path`api/jobs/${id}/metrics?after=${lines.at(-1)?.id ?? after}&limit=${MOST}` + wanted, { signal });
    lines.push(...items);
    if (items.length < MOST) return lines;
  }
}

/** Everything of one job as it comes: {job, events, lines, log, error}. Goes on by itself when the connection is lost. */
export function useJob(id) {
  const [, redraw] = useState(0);
  const [turn, setTurn] = useState(0);
  const seen = useRef(null);
  if (seen.current?.id !== id) seen.current = { id, job: null, events: [], lines: [], log: "", error: null };
  useEffect(() => {
    const controller = new AbortController();
    const { signal } = controller;
    let timer = null;
    const soon = () => {
      timer ??= setTimeout(() => { timer = null; redraw((before) => before + 1); }, 60);
    };
    const follow = async () => {
      const now = seen.current;
      while (!signal.aborted) {
        try {
          now.job = await get(path`api/jobs/${id}`, { signal });
          const lines = await linesOf(id, 0, null, signal); // zipped, as a stream is not
          Object.assign(now, { events: [], lines, log: "", error: null });
          soon();
          const cursor = `0.${lines.at(-1)?.id ?? 0}.0`; // all events, the lines that come, the whole log
          for await (const message of stream("GET", path`api/jobs/${id}/stream?after=${cursor}`, undefined, { signal })) {
            take(now, message);
            soon();
          }
          now.job = await get(path`api/jobs/${id}`, { signal });
          soon();
          if (isOver(now.job.state)) return;
        } catch (error) {
          if (error.name === "AbortError") return;
          now.error = error;
          soon();
          if (error.status === 404 || error.status === 401 || error.status === 403) return;
        }
        await new Promise((done) => setTimeout(done, AGAIN));
      }
    };
    follow();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [id, turn]);
  return { ...seen.current, reload: () => setTurn(turn + 1) };
}

function take(now, message) {
  const { type, ...body } = message;
  if (type === "state") now.job = body.job;
  else if (type === "event") now.events.push(body);
  else if (type === "metric") now.lines.push(body);
  else if (type === "log") now.log += body.text;
}
