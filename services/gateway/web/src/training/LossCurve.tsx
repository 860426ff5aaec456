import { curvesOf, titleOf, type Progress } from "./progress";

const WIDTH = 640;
const HEIGHT = 120;

/** The loss curves of all training stages side by side, with the same scale for the loss. */
export function LossCurve({ progress }: { progress: Progress }) {
  const curves = curvesOf(progress);
  const losses = curves.flatMap(({ curve }) => curve.map(([, loss]) => loss));
  if (losses.length < 2) return null;
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const spans = curves.map(({ name, curve }) => Math.max(progress.stages[name]!.steps, curve.at(-1)![0]));
  const total = spans.reduce((sum, span) => sum + span, 0);
  const y = (loss: number) => HEIGHT - ((loss - low) / (high - low || 1)) * HEIGHT;
  let before = 0;
  const drawn = curves.map(({ name, curve }, index) => {
    const start = (before / total) * WIDTH;
    const points = curve.map(([step, loss]) => `${round(((before + step) / total) * WIDTH)},${round(y(loss))}`);
    before += spans[index]!;
    return { name, start, points: points.join(" "), last: curve.at(-1)![1] };
  });
  const summary = drawn.map(({ name, last }) => `${titleOf(name)} at ${last.toFixed(2)}`).join(", ");
  return (
    <figure class="training-curve">
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
        preserveAspectRatio="none"
        role="img"
        aria-label={`Loss from ${high.toFixed(2)} down to ${low.toFixed(2)}: ${summary}`}
        data-testid="loss-curve"
      >
        {drawn.map(({ name, start, points }) => (
          <g key={name}>
            {start > 0 && <line x1={start} x2={start} y1={0} y2={HEIGHT} />}
            <polyline points={points} vector-effect="non-scaling-stroke" />
          </g>
        ))}
      </svg>
      <figcaption>
        <span>loss {high.toFixed(2)}</span>
        <span>{low.toFixed(2)}</span>
      </figcaption>
    </figure>
  );
}

const round = (value: number): number => Math.round(value * 10) / 10;
