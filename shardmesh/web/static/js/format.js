// Numbers and times for people, always with the same number of digits where they change.

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

export const timeOfDay = (seconds) => clock.format(seconds * 1000);

export function dayOf(seconds) {
  const then = new Date(seconds * 1000);
  const today = new Date();
  const days = Math.round((new Date(today).setHours(0, 0, 0, 0) - new Date(then).setHours(0, 0, 0, 0)) / 86400000);
  if (days === 0) return "Today";
  return days === 1 ? "Yesterday" : day.format(then);
}

export function ms(value) {
  if (value === undefined || value === null) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  return `${value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)} ms`;
}

export const rate = (value) => (value === undefined || value === null ? "–" : value.toFixed(value >= 1000 ? 0 : 1));

export function bytes(value) {
  if (value < 1024) return `${Math.round(value)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let n = value / 1024;
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${n >= 100 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

export const gib = (mib) => (mib / 1024 >= 100 ? (mib / 1024).toFixed(0) : (mib / 1024).toFixed(1));

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

export const range = (start, end) => `[${start}, ${end})`;

/** A node's name, or the end of its peer id, which is never alike. */
export function nodeName(peerId, node) {
  const end = peerId.slice(-8);
  if (!node?.name) return end;
  return node.name_clash ? `${node.name} ${end}` : node.name;
}

export function list(words) {
  if (words.length < 2) return words.join("");
  return `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`;
}
