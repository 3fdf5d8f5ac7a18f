// Numbers as people read them.

const nothing = "–";

export function count(value) {
  if (value === null || value === undefined) return nothing;
  if (value >= 100000) return `${(value / 1000).toFixed(0)}k`;
  if (value >= 100 || Number.isInteger(value)) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toLocaleString("en", { maximumFractionDigits: value >= 10 ? 1 : 2 });
}

export function seconds(value) {
  if (value === null || value === undefined) return nothing;
  if (value >= 10) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 0.1) return `${(value * 1000).toFixed(0)} ms`;
  if (value >= 0.01) return `${(value * 1000).toFixed(1)} ms`;
  return `${(value * 1000).toFixed(2)} ms`;
}

export function share(value) {
  return value === null || value === undefined ? nothing : `${(value * 100).toFixed(value < 0.1 && value > 0 ? 1 : 0)} %`;
}

// "1.25 s" as its number and its unit, to be set in different sizes.
export function parts(text) {
  const [number, ...unit] = text.split(" ");
  return [number, unit.join(" ")];
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}
