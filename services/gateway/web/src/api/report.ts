/** The report on a model: its Markdown, or the reason why there is none. */
export type Report =
  | { kind: "report"; text: string; revision: string; served: string; picture: (name: string) => string | null }
  | { kind: "none"; why: string };

// The address of a picture of the report has no folder, because all files of a report are in one folder.
const PICTURE = /^[\w-]+\.png$/;

/**
 * Loads the report from the gateway. `base` is the page's address; `model` may be empty if only one model is served.
 * If the server sends no report on this model, loads the report on the model that serves now.
 */
export async function loadReport(base: string, model: string, apiKey: string): Promise<Report> {
  const address = (file: string, name: string) => {
    const url = new URL(`report/${file}`, base);
    if (name) url.searchParams.set("model", name);
    return url;
  };
  const get = (name: string) =>
    fetch(address("report.md", name), { headers: apiKey ? { Authorization: `Bearer ${apiKey}` } : {} });
  try {
    let response = await get(model);
    const chosen = response.ok ? model : "";
    if (!response.ok && model) response = await get("");
    if (!response.ok) return { kind: "none", why: await reason(response) };
    return {
      kind: "report",
      text: await response.text(),
      revision: response.headers.get("nanochat-report-revision") ?? "",
      served: response.headers.get("nanochat-served-revision") ?? "",
      picture: (name) => (PICTURE.test(name) ? address(name, chosen).href : null),
    };
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // fetch throws TypeError if it cannot reach the server
    return { kind: "none", why: "The server cannot be reached." };
  }
}

async function reason(response: Response): Promise<string> {
  try {
    const body = (await response.json()) as { error?: { message?: string } };
    return body.error?.message ?? `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}
