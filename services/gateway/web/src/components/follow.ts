import { useSignal, type Signal } from "@preact/signals";
import type { RefObject } from "preact";
import { useEffect, useRef } from "preact/hooks";

const ROUNDING_PX = 1; // at the end of the content, a distance of less than a pixel may remain
const LET_GO_PX = 2; // the page scrolls up this far to leave the end; it must be more than ROUNDING_PX

export interface Following {
  scroller: RefObject<HTMLDivElement | null>;
  content: RefObject<HTMLDivElement | null>;
  /** Whether the view follows the end while the content grows. */
  atEnd: Signal<boolean>;
  toEnd: () => void;
}

/** Keeps a scroller at its end while its content grows, until the person scrolls up, even if only a little. */
export function useFollow(): Following {
  const scroller = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const atEnd = useSignal(true);
  const toEnd = () => {
    atEnd.value = true;
    scroller.current?.scrollTo({ top: scroller.current.scrollHeight });
  };
  useEffect(() => {
    const view = scroller.current!;
    let lastTop = view.scrollTop;
    const onScroll = () => {
      const distance = view.scrollHeight - view.scrollTop - view.clientHeight;
      // Only a scroll upward stops the following, because only the person scrolls upward. A larger distance to the end
      // is not enough: growing content increases it too.
      if (distance < ROUNDING_PX) atEnd.value = true;
      else if (view.scrollTop < lastTop) atEnd.value = false;
      lastTop = view.scrollTop;
    };
    const onWheel = (event: WheelEvent) => {
      if (!atEnd.peek() || event.deltaY >= 0 || event.ctrlKey || scrollsInside(view, event.target)) return;
      // WebKit scrolls in another thread. Following the end may undo that scroll before the page learns of it, so the
      // page itself scrolls a little.
      view.scrollTop -= LET_GO_PX;
      onScroll();
    };
    const observer = new ResizeObserver(() => {
      // The position is read first, because the person may have scrolled since the last scroll event.
      onScroll();
      if (!atEnd.peek()) return;
      view.scrollTop = view.scrollHeight;
      lastTop = view.scrollTop;
    });
    observer.observe(content.current!);
    observer.observe(view);
    view.addEventListener("scroll", onScroll, { passive: true });
    view.addEventListener("wheel", onWheel, { passive: true });
    return () => {
      observer.disconnect();
      view.removeEventListener("scroll", onScroll);
      view.removeEventListener("wheel", onWheel);
    };
  }, []);
  return { scroller, content, atEnd, toEnd };
}

/** Whether an element inside of the view takes a scroll up, because it has been scrolled down itself. */
function scrollsInside(view: Element, target: EventTarget | null): boolean {
  for (let node = target as Element | null; node && node !== view; node = node.parentElement) {
    if (node.scrollTop > 0) return true;
  }
  return false;
}
