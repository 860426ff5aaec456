import { useRef } from "preact/hooks";

interface FilePickerProps {
  /** The text of the button. */
  text: string;
  /** The purpose of the file, for people who do not see the page. */
  label: string;
  testId: string;
  accept: string;
  disabled?: boolean;
  onFile: (file: File) => void;
}

/** A button with which people choose a file. */
export function FilePicker({ text, label, testId, accept, disabled = false, onFile }: FilePickerProps) {
  const picker = useRef<HTMLInputElement>(null);
  return (
    <>
      <button type="button" class="button" disabled={disabled} onClick={() => picker.current!.click()}>
        {text}
      </button>
      <input
        ref={picker}
        type="file"
        class="visually-hidden"
        tabIndex={-1}
        aria-label={label}
        data-testid={testId}
        accept={accept}
        onChange={({ currentTarget }) => {
          const file = currentTarget.files?.[0];
          currentTarget.value = ""; // so that choosing the same file again causes an event
          if (file) onFile(file);
        }}
      />
    </>
  );
}
