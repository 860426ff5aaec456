import { useSignal, type Signal } from "@preact/signals";
import type { RefObject } from "preact";
import { useEffect, useRef } from "preact/hooks";

const ROUNDING_PX = 1; // at the end of the content, a distance of less than a pixel may remain

export interface Following {
  scroller: RefObject<HTMLDivElement | null>;
  content: RefObject<HTMLDivElement | null>;
  /** Whether the view follows the end while the content grows. */
  atEnd: Signal<boolean>;
  toEnd: () => void;
}

/** Keeps a scroller at its end while its content grows, until the person scrolls up, however little. */
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
      // Growing content also increases the distance to the end, but only the person scrolls upward.
      if (distance < ROUNDING_PX) atEnd.value = true;
      else if (view.scrollTop < lastTop) atEnd.value = false;
      lastTop = view.scrollTop;
    };
    const observer = new ResizeObserver(() => {
      // The person may have scrolled since the last scroll event.
      onScroll();
      if (!atEnd.peek()) return;
      view.scrollTop = view.scrollHeight;
      lastTop = view.scrollTop;
    });
    observer.observe(content.current!);
    observer.observe(view);
    view.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      observer.disconnect();
      view.removeEventListener("scroll", onScroll);
    };
  }, []);
  return { scroller, content, atEnd, toEnd };
}
