/** A duration such as "2 ms", "1.4 s" or "3 min 5 s". */
export function duration(seconds: number): string {
  if (seconds < 0.9995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** A rate as text: without decimals from 10 on, and with one decimal below 10. */
export function rate(perSecond: number): string {
  return perSecond >= 10 ? Math.round(perSecond).toLocaleString("en") : perSecond.toFixed(1);
}

export function count(number: number, noun: string): string {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** The heading under which the conversation list shows a time. */
export function period(time: number, now: Date = new Date()): string {
  const midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate());
  if (time >= midnight.getTime()) return "Today";
  midnight.setDate(midnight.getDate() - 1);
  if (time >= midnight.getTime()) return "Yesterday";
  midnight.setDate(midnight.getDate() - 6);
  return time >= midnight.getTime() ? "Last 7 days" : "Earlier";
}
