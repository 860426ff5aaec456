import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";

const ROOT = join(import.meta.dirname, "..");
const read = (path: string) => readFileSync(join(ROOT, path), "utf8");

test("the page holds nothing that its Content-Security-Policy would block", () => {
  for (const page of ["index.html", "report.html", "status.html"]) {
    const html = read(page);
    expect(html).not.toMatch(/<script(?![^>]*\ssrc=)/); // inline scripts
    expect(html).not.toMatch(/<style|\sstyle=|\son\w+=/);
    expect(html).not.toMatch(/(src|href)="(https?:)?\/\//);
  }
  for (const name of readdirSync(join(ROOT, "src/components"))) {
    expect(read(`src/components/${name}`), name).not.toMatch(/\sstyle=/);
  }
});

const tokens = read("src/styles/tokens.css");

/** The light and the dark value of a color. */
function colors(name: string): [string, string] {
  const match = new RegExp(`--${name}: light-dark\\((#\\w{6}), (#\\w{6})\\)`).exec(tokens);
  if (!match) throw new Error(`no color ${name}`);
  return [match[1]!, match[2]!];
}

/** Relative luminance after WCAG 2.2. */
function luminance(hex: string): number {
  const [r, g, b] = [1, 3, 5].map((start) => {
    const value = parseInt(hex.slice(start, start + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
}

function contrast(one: string, other: string): number {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light! + 0.05) / (dark! + 0.05);
}

const GROUNDS = ["paper", "paper-side", "surface", "sunken", "hover"];
const PAIRS = [
  ...["ink", "ink-soft", "ink-faint", "accent"].flatMap((text) => GROUNDS.map((ground) => [text, ground])),
  ...["keyword", "string", "number", "name", "comment"].map((kind) => [`code-${kind}`, "sunken"]),
  ["ink", "bubble"],
  ["ink", "accent-soft"],
  ["on-accent", "accent"],
  ["on-accent", "accent-hover"],
  ["danger", "surface"],
  ["danger", "sunken"],
  ["danger", "danger-soft"],
  ["warning", "warning-soft"],
] as [string, string][];

test.each(PAIRS)("%s on %s is readable in both themes (WCAG AA)", (text, ground) => {
  const [lightText, darkText] = colors(text);
  const [lightGround, darkGround] = colors(ground);
  expect(contrast(lightText, lightGround)).toBeGreaterThanOrEqual(4.5);
  expect(contrast(darkText, darkGround)).toBeGreaterThanOrEqual(4.5);
});
