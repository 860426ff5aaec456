import { headline, type Problem } from "../chat/problem";
import { usePage } from "./context";

/** Says why an answer is missing or incomplete, and offers the action that helps, if there is one. */
export function ProblemNote({ problem, retry }: { problem: Problem; retry?: () => void }) {
  const { app } = usePage();
  const said = problem.kind === "context" || problem.kind === "busy" || problem.kind === "key";
  return (
    <div class="problem" role="alert">
      <p>{headline(problem)}</p>
      {said && <p class="problem-detail">{problem.detail}</p>}
      <div class="problem-actions">
        {problem.kind === "key" && (
          <button type="button" class="button" onClick={() => (app.settingsOpen.value = true)}>
            Settings
          </button>
        )}
        {retry && problem.kind !== "context" && (
          <button type="button" class="button" data-testid="retry" onClick={retry}>
            Retry
          </button>
        )}
      </div>
    </div>
  );
}
