import { useMemo } from "preact/hooks";
import type { Report } from "../api/report";
import { pageHtml } from "../text/markdown";
import { copyCode } from "./Markdown";

/** The report on the model; `null` until it has loaded. */
export function ReportPage({ report }: { report: Report | null }) {
  return (
    <div class="report-page">
      <header class="header">
        <h1>Report</h1>
        <a class="button" href="./">
          Chat
        </a>
      </header>
      <main data-testid="report" data-state={report === null ? "loading" : report.kind}>
        {report?.kind === "none" && (
          <p class="faint" role="status">
            {report.why}
          </p>
        )}
        {report?.kind === "report" && <Content report={report} />}
      </main>
    </div>
  );
}

function Content({ report }: { report: Extract<Report, { kind: "report" }> }) {
  const { text, revision, served, picture } = report;
  const html = useMemo(() => pageHtml(text, picture), [text, picture]);
  const other = revision !== "" && served !== "" && revision !== served;
  return (
    <>
      {other && (
        <p class="report-note" role="note" data-testid="other-revision">
          This report is about {revision}. What answers in the chat is {served}.
        </p>
      )}
      <article
        class="prose report"
        onClick={(event) => void copyCode(event.target as Element)}
        dangerouslySetInnerHTML={{ __html: html }}
      />
    </>
  );
}
