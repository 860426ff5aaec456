import { usePage } from "./context";
import { ArrowIcon } from "./icons";

/** Examples for models that have none of their own. */
const EXAMPLES = ["Hello! Who are you?", "What is 1234 * 5678?"];

export function EmptyState() {
  const { app } = usePage();
  const own = app.models.value.find(({ id }) => id === app.model.value)?.nanochat?.examples;
  const examples = own?.length ? own : EXAMPLES;
  return (
    <section class="empty" aria-labelledby="empty-title">
      <h2 id="empty-title">Say hello.</h2>
      <p>
        This model was trained from raw text and runs on your own server. When it has to calculate, it writes a little
        Python.
      </p>
      <ul class="examples" aria-label="Examples">
        {examples.map((example) => (
          <li key={example}>
            <button type="button" data-testid="example" onClick={() => app.send(example)}>
              <span>{example}</span>
              <ArrowIcon />
            </button>
          </li>
        ))}
      </ul>
    </section>
  );
}
