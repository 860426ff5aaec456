import type { Signal } from "@preact/signals";
import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { ChatApp } from "../chat/chat-app";
import type { Layout } from "../page/layout";
import type { Lessons } from "../lessons/watch";
import type { Drafts } from "../storage/drafts";
import type { Theme } from "../storage/theme";
import type { TrainingWatch } from "../training/watch";

export interface Page {
  app: ChatApp;
  theme: Signal<Theme>;
  layout: Layout;
  drafts: Drafts;
  training: TrainingWatch;
  lessons: Lessons;
}

export const PageContext = createContext<Page | null>(null);

export function usePage(): Page {
  const page = useContext(PageContext);
  if (!page) throw new Error("the component is outside of the page");
  return page;
}
