// Lines over steps or time, drawn by uPlot, which is loaded when the first chart is shown.

import { number } from "./format.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./html.js";

export const COLOURS = 6;

let loading = null;

function load() {
  if (!document.querySelector("link[data-uplot]")) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("./vendor/uplot.css", import.meta.url).href;
    link.dataset.uplot = "";
    document.head.append(link);
  }
  loading ??= import("./vendor/uplot.js").then((module) => module.default);
  return loading;
}

const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000];
/** At least a minute; of one point alone uPlot would make a day. */
function lastMinute(u, low, high) {
  const last = u.data[0].at(-1) ?? 60;
  return u.data[0].length < 2 ? [last - 60, last] : [Math.min(low, high - 60), high];
}

const powerOfTen = (one) => (one > 0 && Math.abs(Math.log10(one) - Math.round(Math.log10(one))) < 1e-9 ? one : null);
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

/** What a CSS colour such as var(--line) is at this moment: a canvas knows no variables. */
function colour(element, name) {
  element.style.color = `var(--${name})`;
  const found = getComputedStyle(element).color;
  element.style.color = "";
  return found;
}

function options(uPlot, box, { series, log, height, xLabel, xTime, marks, onPoint }) {
  const text = colour(box, "muted");
  const line = colour(box, "line");
  const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
  return {
    width: Math.max(box.clientWidth, 200),
    height,
    legend: { show: false },
    cursor: { y: false, drag: { x: true, y: false } },
    scales: { x: { time: Boolean(xTime), ...(xTime ? { range: lastMinute } : {}) }, y: { distr: log ? 3 : 1, range: log ? undefined : (u, low, high) => uPlot.rangeNum(low ?? 0, high ?? 1, 0.08, true) } },
    axes: [
      xTime ? { ...axis, size: 24, space: 80, values: (u, found) => found.map(clock) } : { ...axis, size: 24, label: xLabel, labelSize: 16, labelFont: axis.font, labelGap: -2, incrs: STEPS },
      { ...axis, size: 54, grid: { ...axis.grid, ...(log ? { filter: (u, found) => found.map(powerOfTen) } : {}) }, values: (u, found) => found.map((one) => (one === null ? "" : number(one))) },
    ],
    series: [
      {},
      ...series.map((one) => ({
        label: one.label, stroke: colour(box, `c${(one.colour % COLOURS) + 1}`), width: one.thin ? 1 : 2, alpha: one.thin ? 0.75 : 1,
        dash: one.dash, spanGaps: true, points: { show: Boolean(one.points_shown), size: 5 },
      })),
    ],
    hooks: {
      draw: [(u) => drawMarks(u, box, marks)],
      setCursor: [(u) => onPoint(u.cursor.idx)],
    },
  };
}

function drawMarks(u, box, marks) {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio;
  for (const { x, label } of marks) {
    const left = u.valToPos(x, "x", true);
    if (left < bbox.left || left > bbox.left + bbox.width) continue;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour(box, "warn");
    ctx.setLineDash([4 * ratio, 3 * ratio]);
    ctx.lineWidth = ratio;
    ctx.beginPath();
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    const right = left < bbox.left + bbox.width / 2;
    ctx.textAlign = right ? "left" : "right";
    ctx.fillText(label, left + (right ? 5 : -5) * ratio, bbox.top + 13 * ratio);
    ctx.restore();
  }
}

/** `series`: {label, points: [x, y][], colour, thin?, points_shown?}; `marks`: {x, label}; `summary` says it in words. */
export function Chart({ series, log = false, height = 260, xLabel = "", xTime = false, marks = [], summary }) {
  const box = useRef(null);
  const plot = useRef(null);
  const [uPlot, setLibrary] = useState(null);
  const [theme, setTheme] = useState(0);
  const [readout, setReadout] = useState("");
  const drawn = series.filter((one) => one.points.length);
  const data = useRef([[]]);
  const shape = JSON.stringify([drawn.map((one) => [one.label, one.colour, one.thin]), log, height, xLabel, theme]);
  const latest = useRef({ drawn, marks });
  latest.current = { drawn, marks };

  useEffect(() => {
    load().then((found) => setLibrary(() => found), () => {
      loading = null;
      setReadout("The chart could not be loaded. If the server was updated, load this page again.");
    });
    const change = () => setTheme((turn) => turn + 1);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    window.addEventListener("lorikeet:theme", change);
    dark.addEventListener("change", change);
    return () => {
      window.removeEventListener("lorikeet:theme", change);
      dark.removeEventListener("change", change);
    };
  }, []);
  useLayoutEffect(() => {
    if (!uPlot || !drawn.length) return undefined;
    const live = []; // the marks as they are when the chart is drawn again
    live[Symbol.iterator] = () => latest.current.marks[Symbol.iterator]();
    const onPoint = (index) => {
      const [xs, ...columns] = data.current;
      if (index === null || index === undefined || xs[index] === undefined) return setReadout("");
      const parts = columns.flatMap((values, i) => (values[index] === null || values[index] === undefined ? [] : [`${latest.current.drawn[i]?.label} ${number(values[index], 4)}`]));
      return setReadout(`${xTime ? new Date(1000 * xs[index]).toLocaleTimeString() : `${xLabel} ${xs[index]}`}: ${parts.join(", ")}`);
    };
    data.current = joined(uPlot, drawn);
    const made = new uPlot(options(uPlot, box.current, { series: drawn, log, height, xLabel, xTime, marks: live, onPoint }), data.current, box.current);
    plot.current = made;
    const watch = new ResizeObserver(() => made.setSize({ width: Math.max(box.current.clientWidth, 200), height }));
    watch.observe(box.current);
    return () => {
      watch.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [uPlot, shape]);
  useEffect(() => {
    if (!plot.current || !drawn.length) return;
    data.current = joined(uPlot, drawn);
    plot.current.setData(data.current);
  }, [drawn.map((one) => `${one.points.length}:${one.points.at(-1)}:${one.points[0]}`).join(), marks.map((one) => one.x).join(), series.map((one) => one.version).join()]);

  return html`
    <figure class="chart">
      <div class="plot" ref=${box} role="img" aria-label=${summary} style=${{ minHeight: `${height}px` }}></div>
      <p class="readout" aria-hidden="true">${readout}</p>
    </figure>`;
}

const joined = (uPlot, series) => uPlot.join(series.map((one) => [one.points.map((point) => point[0]), one.points.map((point) => point[1])]));
