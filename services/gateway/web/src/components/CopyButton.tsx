import { useSignal } from "@preact/signals";
import { copyText } from "../page/clipboard";
import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { CheckIcon, CopyIcon } from "./icons";

const FEEDBACK_MS = 1600;

export function CopyButton({ label, text }: { label: string; text: () => string }) {
  const { app } = usePage();
  const copied = useSignal(false);
  const copy = async () => {
    copied.value = await copyText(text());
    app.announcement.value = copied.value ? "Copied." : "Copying failed.";
    setTimeout(() => {
      copied.value = false;
    }, FEEDBACK_MS);
  };
  return (
    <IconButton label={label} onClick={() => void copy()}>
      {copied.value ? <CheckIcon /> : <CopyIcon />}
    </IconButton>
  );
}
