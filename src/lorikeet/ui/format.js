// Numbers, sizes, times and names as the page writes them.

const NONE = "–";
const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export function count(value) {
  return missing(value) ? NONE : plain.format(value);
}

/** Three significant digits or so, without an exponent where one can do without. */
export function number(value, digits = 3) {
  if (missing(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(digits - 2, 1));
  return size >= 1000 ? plain.format(value) : Number(value.toPrecision(digits)).toString();
}

/** A fixed number of decimals, so that columns of them line up. */
export function fixed(value, decimals = 3) {
  return missing(value) ? NONE : value.toFixed(decimals);
}

export function percent(share, decimals = 1) {
  return missing(share) ? NONE : `${(100 * share).toFixed(decimals)}%`;
}

export function bytes(value) {
  if (missing(value)) return NONE;
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (size < 1024) return `${unit === "B" ? size : size.toFixed(size < 10 ? 1 : 0)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}

/** Seconds as a duration: 12 ms, 3.2 s, 4 m 05 s, 2 h 10 m. */
export function duration(seconds) {
  if (missing(seconds)) return NONE;
  if (seconds < 0.9995) return `${(1000 * seconds).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const two = (part) => String(part).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} m`;
}

/** CPU time, in seconds of one core. */
export function coreSeconds(seconds) {
  return seconds > 0 && seconds < 10 ? seconds.toFixed(1) : count(seconds);
}

/** A moment, in seconds since the epoch, as the reader's local time. */
export function moment(seconds) {
  if (missing(seconds) || !seconds) return NONE;
  const date = new Date(1000 * seconds);
  const two = (part) => String(part).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function ago(seconds) {
  if (missing(seconds) || !seconds) return NONE;
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return `${Math.floor(past / 86400)} d ago`;
}

export function plural(amount, one, many = `${one}s`) {
  return `${count(amount)} ${amount === 1 ? one : many}`;
}

/** Any value of a recipe or of metrics, as text. */
export function value(found) {
  if (missing(found)) return NONE;
  if (typeof found === "number") return number(found, 4);
  if (typeof found !== "object") return String(found);
  if (Array.isArray(found)) return found.map(value).join(", ") || "none";
  return Object.entries(found).filter(([, one]) => !missing(one)).map(([name, one]) => `${name.replaceAll("_", " ")} ${value(one)}`).join(", ");
}
