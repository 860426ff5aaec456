import { useLayoutEffect, useRef } from "preact/hooks";
import { runShortcut } from "../page/shortcuts";
import { Banners } from "./Banner";
import { Composer } from "./Composer";
import { Header } from "./Header";
import { KeyboardDialog } from "./KeyboardDialog";
import { SettingsDialog } from "./SettingsDialog";
import { Sidebar } from "./Sidebar";
import { Thread } from "./Thread";
import { ToastView } from "./Toast";
import { TeachDialog } from "../lessons/TeachDialog";
import { TrainingPanel } from "../training/TrainingPanel";
import { usePage } from "./context";

export function App() {
  const { app, layout, training } = usePage();
  const drawerOpen = layout.narrow.value && layout.sidebarOpen.value;
  useShortcuts();
  useSidebarFocus();
  return (
    <div class="app" data-sidebar={layout.sidebarOpen.value ? "open" : "closed"}>
      <Sidebar />
      {drawerOpen && <div class="backdrop" onClick={() => layout.closeDrawer()} />}
      <div class="page" inert={drawerOpen}>
        <Header />
        <Banners />
        <TrainingPanel watch={training} chatting={app.active.value !== null} />
        <main>
          <Thread />
          <div class="foot">
            <Composer />
            <p class="small-print">Small models make mistakes. Check what matters.</p>
          </div>
        </main>
      </div>
      <SettingsDialog />
      <KeyboardDialog />
      <TeachDialog />
      <ToastView />
      <div class="visually-hidden" aria-live="polite" data-testid="announcement">
        {app.announcement.value}
      </div>
    </div>
  );
}

function useShortcuts() {
  const { app, layout } = usePage();
  useLayoutEffect(() => {
    const write = () => document.querySelector<HTMLElement>("[data-testid=composer]")?.focus();
    // An open dialog or menu handles Escape itself. Meanwhile, only the key for a new chat acts on the page behind it.
    const isCovered = () => document.querySelector("dialog[open], :popover-open") !== null;
    const actions = {
      escape: () => {
        const open = app.active.peek();
        if (isCovered()) return;
        if (layout.narrow.peek() && layout.sidebarOpen.peek()) layout.closeDrawer();
        else if (open?.writing.peek()) app.stop(open);
      },
      newChat: () => {
        app.settingsOpen.value = false;
        app.keyboardOpen.value = false;
        layout.closeDrawer();
        app.newChat();
        write();
      },
      write: () => !isCovered() && write(),
      help: () => !isCovered() && (app.keyboardOpen.value = true),
    };
    const onKeyDown = (event: KeyboardEvent) => runShortcut(event, actions) && event.preventDefault();
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, []);
}

/**
 * Moves the focus into the list of conversations when the list opens, and back to the list's button when it closes, if
 * no element that can be reached has the focus then.
 */
function useSidebarFocus() {
  const { layout } = usePage();
  const open = layout.sidebarOpen.value;
  const seen = useRef(open);
  useLayoutEffect(() => {
    if (seen.current === open) return;
    seen.current = open;
    const lost = document.activeElement === document.body || document.activeElement?.closest("[inert]");
    if (lost) document.querySelector<HTMLElement>(open ? ".sidebar button" : "[data-testid=sidebar-toggle]")?.focus();
  }, [open]);
}
