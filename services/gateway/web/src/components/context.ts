import type { Signal } from "@preact/signals";
import { createContext } from "preact";
import { useContext } from "preact/hooks";
import type { ChatApp } from "../chat/chat-app";
import type { Layout } from "../page/layout";
import type { Theme } from "../storage/theme";

export interface Page {
  app: ChatApp;
  theme: Signal<Theme>;
  layout: Layout;
}

export const PageContext = createContext<Page | null>(null);

export function usePage(): Page {
  const page = useContext(PageContext);
  if (!page) throw new Error("the component is outside of the page");
  return page;
}
