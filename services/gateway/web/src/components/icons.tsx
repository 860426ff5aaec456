import type { ComponentChildren } from "preact";

/** Line icons on a 20 × 20 grid. They are decoration: the button around an icon has the accessible name. */
function icon(children: ComponentChildren) {
  return () => (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true">
      {children}
    </svg>
  );
}

export const SendIcon = icon(<path d="M10 16V4.5M5 9l5-5 5 5" />);
export const StopIcon = icon(<rect class="filled" x="5.5" y="5.5" width="9" height="9" rx="1.5" />);
export const PlusIcon = icon(<path d="M10 4.5v11M4.5 10h11" />);
export const SidebarIcon = icon(
  <>
    <rect x="3" y="4" width="14" height="12" rx="2.5" />
    <path d="M8 4v12" />
  </>,
);
export const SettingsIcon = icon(
  <>
    <path d="M3 6.5h7.5M14.5 6.5H17M3 13.5h2.5M9.5 13.5H17" />
    <circle cx="12.5" cy="6.5" r="2" />
    <circle cx="7.5" cy="13.5" r="2" />
  </>,
);
export const ReportIcon = icon(<path d="M3.5 16.5h13M6 13.5V9M10 13.5v-9M14 13.5V7" />);
export const TeachIcon = icon(<path d="M2.5 8 10 4.5 17.5 8 10 11.5 2.5 8ZM5.5 9.5v4c2.5 2 6.5 2 9 0v-4M17.5 8v4.5" />);
export const MoreIcon = icon(
  <>
    <circle class="filled" cx="5" cy="10" r="1" />
    <circle class="filled" cx="10" cy="10" r="1" />
    <circle class="filled" cx="15" cy="10" r="1" />
  </>,
);
export const CopyIcon = icon(
  <>
    <rect x="7" y="7" width="9" height="9" rx="2" />
    <path d="M13 4.5A1.5 1.5 0 0 0 11.5 4H6a2 2 0 0 0-2 2v5.5A1.5 1.5 0 0 0 4.5 13" />
  </>,
);
export const CheckIcon = icon(<path d="m4.5 10.5 3.5 3.5 7.5-8" />);
export const EditIcon = icon(<path d="M4 16v-3l8.5-8.5a2.1 2.1 0 0 1 3 3L7 16H4ZM11 6l3 3" />);
export const RegenerateIcon = icon(<path d="M15.5 8A6 6 0 1 0 16 11.5M15.8 3.8V8h-4.2" />);
export const ChevronIcon = icon(<path d="m6 8 4 4 4-4" />);
export const PreviousIcon = icon(<path d="m12 6-4 4 4 4" />);
export const NextIcon = icon(<path d="m8 6 4 4-4 4" />);
export const DownIcon = icon(<path d="M10 4v11.5M5 11l5 5 5-5" />);
export const ArrowIcon = icon(<path d="M4 10h11.5M11 5l5 5-5 5" />);
export const CloseIcon = icon(<path d="m5 5 10 10M15 5 5 15" />);
export const SunIcon = icon(
  <>
    <circle cx="10" cy="10" r="3.2" />
    <path d="M10 2.5v2M10 15.5v2M2.5 10h2M15.5 10h2M4.7 4.7l1.4 1.4M13.9 13.9l1.4 1.4M4.7 15.3l1.4-1.4M13.9 6.1l1.4-1.4" />
  </>,
);
export const MoonIcon = icon(<path d="M16 11.8A6.5 6.5 0 0 1 8.2 4a6.5 6.5 0 1 0 7.8 7.8Z" />);
export const ScreenIcon = icon(
  <>
    <rect x="3" y="4" width="14" height="9.5" rx="1.8" />
    <path d="M7.5 16.5h5" />
  </>,
);
