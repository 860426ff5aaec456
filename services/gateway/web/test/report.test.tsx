// @vitest-environment jsdom
import { render } from "preact";
import { afterEach, expect, test, vi } from "vitest";
import { loadReport, type Report } from "../src/api/report";
import { ReportPage } from "../src/components/ReportPage";
import { pageHtml } from "../src/text/markdown";

afterEach(() => vi.unstubAllGlobals());

type Answer = { status?: number; body: string; headers?: Record<string, string> };

function server(answers: Record<string, Answer>): string[] {
  const asked: string[] = [];
  vi.stubGlobal("fetch", (url: URL) => {
    asked.push(url.href);
    const { status = 200, body, headers } = answers[url.search] ?? { status: 404, body: "{}" };
    return Promise.resolve(new Response(body, { status, headers: headers ?? {} }));
  });
  return asked;
}

async function shown(report: Report | null): Promise<HTMLElement> {
  const root = document.createElement("div");
  render(<ReportPage report={report} />, root);
  return root;
}

const found = (change: Partial<Extract<Report, { kind: "report" }>>): Report => ({
  kind: "report",
  text: "# Title",
  revision: "sft/step_2",
  served: "sft/step_2",
  picture: (name) => `http://host/report/${name}`,
  ...change,
});

test("a picture of the report is shown from where the report lies", async () => {
  server({ "": { body: "![Loss](loss.png)" } });
  const report = (await loadReport("http://host/chat/report", "", "")) as Extract<Report, { kind: "report" }>;
  const picture = (await shown(report)).querySelector("img")!;
  expect([picture.src, picture.alt]).toEqual(["http://host/chat/report/loss.png", "Loss"]);
});

test.each([
  "https://elsewhere.example/pixel.png",
  "//elsewhere.example/pixel.png",
  "../v1/models",
  "folder/loss.png",
  "javascript:alert(1)",
  "data:image/png;base64,AAAA",
  "loss.svg",
  "loss.png?x=1",
])("a picture named %s is not loaded", async (name) => {
  server({ "": { body: `![x](${name})` } });
  const report = await loadReport("http://host/report", "", "");
  const root = await shown(report);
  expect(root.querySelector("img")).toBeNull();
  expect(root.querySelector("article")!.textContent).toContain("x");
});

test("HTML in a report is text, and attributes cannot be smuggled in by a picture's words", () => {
  const root = document.createElement("div");
  root.innerHTML = pageHtml(
    `<img src=x onerror=alert(1)>\n\n![" onerror="alert(1)](loss.png)`,
    (name) => `/report/${name}`,
  );
  const [picture, ...others] = root.querySelectorAll("img");
  expect(others).toEqual([]);
  expect(picture!.getAttributeNames().sort()).toEqual(["alt", "src"]);
  expect(root.textContent).toContain("<img src=x onerror=alert(1)>");
});

test("what a model wrote and the report escaped is shown as it was written", () => {
  const root = document.createElement("div");
  const written = String.raw`\# no heading \*star\* \_line\_ \[a\](b) \<b\> \| \~x\~ \& \$ \\ and 1\. \- x`;
  root.innerHTML = pageHtml(written, () => null);
  expect(root.innerHTML).toMatch(/^<p>[^<]*<\/p>\s*$/);
  expect(root.textContent!.trim()).toBe(String.raw`# no heading *star* _line_ [a](b) <b> | ~x~ & $ \ and 1. - x`);
});

test("the report of a model that is gone gives way to that of the one that serves", async () => {
  const asked = server({ "": { body: "# Here" } });
  const report = await loadReport("http://host/report", "gone", "");
  expect(asked).toEqual(["http://host/report/report.md?model=gone", "http://host/report/report.md"]);
  expect(report.kind === "report" && report.picture("loss.png")).toBe("http://host/report/loss.png");
});

test("the chosen model goes with the pictures", async () => {
  server({ "?model=small": { body: "# Here" } });
  const report = await loadReport("http://host/report", "small", "");
  expect(report.kind === "report" && report.picture("loss.png")).toBe("http://host/report/loss.png?model=small");
});

test("where there is no report the page says why", async () => {
  const message = "There is no such report: the store has no report on demo.";
  server({ "": { status: 404, body: JSON.stringify({ error: { message } }) } });
  const root = await shown(await loadReport("http://host/report", "", ""));
  expect(root.querySelector("[role=status]")!.textContent).toBe(message);
  vi.stubGlobal("fetch", () => Promise.reject(new TypeError("failed")));
  const report = await loadReport("http://host/report", "", "");
  expect(report).toEqual({ kind: "none", why: "The server cannot be reached." });
});

test("a report on another revision than the one that answers says so", async () => {
  const note = async (report: Report) => (await shown(report)).querySelector("[data-testid=other-revision]");
  expect(await note(found({}))).toBeNull();
  expect(await note(found({ revision: "" }))).toBeNull();
  expect((await note(found({ served: "sft/step_1" })))!.textContent).toBe(
    "This report is about sft/step_2. What answers in the chat is sft/step_1.",
  );
});
