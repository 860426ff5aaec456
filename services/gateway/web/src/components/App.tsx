import { useEffect, useRef } from "preact/hooks";
import { Banners } from "./Banner";
import { Composer } from "./Composer";
import { Header } from "./Header";
import { SettingsDialog } from "./SettingsDialog";
import { Sidebar } from "./Sidebar";
import { Thread } from "./Thread";
import { ToastView } from "./Toast";
import { usePage } from "./context";

export function App() {
  const { app, layout } = usePage();
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
        <main>
          <Thread />
          <div class="foot">
            <Composer />
            <p class="small-print">Small models make mistakes. Check what matters.</p>
          </div>
        </main>
      </div>
      <SettingsDialog />
      <ToastView />
      <div class="visually-hidden" aria-live="polite" data-testid="announcement">
        {app.announcement.value}
      </div>
    </div>
  );
}

function useShortcuts() {
  const { app, layout } = usePage();
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent) => {
      // An open dialog or menu handles Escape itself.
      const covered = document.querySelector("dialog[open], :popover-open") !== null;
      if (event.key === "Escape" && !covered) {
        const running = app.active.peek();
        if (layout.narrow.peek() && layout.sidebarOpen.peek()) layout.closeDrawer();
        else if (running) app.stop(running);
      } else if (
        event.key.toLowerCase() === "k" &&
        (event.ctrlKey || event.metaKey) &&
        !event.shiftKey &&
        !event.altKey
      ) {
        event.preventDefault();
        app.settingsOpen.value = false;
        layout.closeDrawer();
        app.newChat();
        document.querySelector<HTMLElement>("[data-testid=composer]")?.focus();
      }
    };
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, []);
}

/** Moves the focus into the list when it opens, and back to the list's button when it closes. */
function useSidebarFocus() {
  const { layout } = usePage();
  const open = layout.sidebarOpen.value;
  const seen = useRef(open);
  useEffect(() => {
    if (seen.current === open) return;
    seen.current = open;
    const lost = document.activeElement === document.body || document.activeElement?.closest("[inert]");
    if (lost) document.querySelector<HTMLElement>(open ? ".sidebar button" : "[data-testid=sidebar-toggle]")?.focus();
  }, [open]);
}
