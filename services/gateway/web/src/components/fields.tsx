import { useSignal } from "@preact/signals";
import { useEffect, useId } from "preact/hooks";

interface Range {
  min: number;
  max: number;
  step: number;
}

interface FieldProps<T> {
  label: string;
  hint: string;
  value: T;
  onChange: (value: T) => void;
}

export function SliderField({ label, hint, value, onChange, range }: FieldProps<number> & { range: Range }) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <output for={id}>{value.toFixed(2)}</output>
      <input
        id={id}
        type="range"
        {...range}
        value={value}
        aria-describedby={`${id}-hint`}
        onInput={(event) => onChange(event.currentTarget.valueAsNumber)}
      />
      <p class="hint" id={`${id}-hint`}>
        {hint}
      </p>
    </div>
  );
}

interface NumberProps extends FieldProps<number | null> {
  range: Range;
  /** The placeholder, which says what an empty field means. */
  placeholder: string;
}

/** A field for a whole number, which may be empty. While its text is not valid, the last valid value stays in use. */
export function NumberField({ label, hint, value, onChange, range, placeholder }: NumberProps) {
  const id = useId();
  const text = useSignal(asText(value));
  const { min, max } = range;
  const parsed = text.value === "" ? null : Number(text.value);
  const valid = parsed === null || (Number.isInteger(parsed) && parsed >= min && parsed <= max);
  // A reset of the settings changes the value without this field, so the field must show the new value.
  useEffect(() => {
    if (valid && parsed !== value) text.value = asText(value);
  }, [value]);
  const write = (input: string) => {
    text.value = input.trim();
    const number = text.value === "" ? null : Number(text.value);
    if (number === null || (Number.isInteger(number) && number >= min && number <= max)) onChange(number);
  };
  return (
    <div class="field">
      <label for={id}>{label}</label>
      <input
        id={id}
        class="number"
        inputMode="numeric"
        placeholder={placeholder}
        value={text.value}
        aria-invalid={!valid}
        aria-describedby={`${id}-hint`}
        onInput={(event) => write(event.currentTarget.value)}
      />
      <p class="hint" id={`${id}-hint`}>
        {valid ? hint : `A whole number from ${min} to ${max.toLocaleString("en")}, or nothing.`}
      </p>
    </div>
  );
}

interface TextProps extends FieldProps<string> {
  kind: "lines" | "secret";
  placeholder?: string;
}

export function TextField({ label, hint, value, onChange, kind, placeholder }: TextProps) {
  const id = useId();
  const common = { id, value, placeholder, "aria-describedby": `${id}-hint` };
  return (
    <div class="field wide">
      <label for={id}>{label}</label>
      {kind === "lines" ? (
        <textarea {...common} rows={4} onInput={(event) => onChange(event.currentTarget.value)} />
      ) : (
        <input
          {...common}
          type="password"
          autocomplete="off"
          onInput={(event) => onChange(event.currentTarget.value.trim())}
        />
      )}
      <p class="hint" id={`${id}-hint`}>
        {hint}
      </p>
    </div>
  );
}

function asText(value: number | null): string {
  return value === null ? "" : String(value);
}
