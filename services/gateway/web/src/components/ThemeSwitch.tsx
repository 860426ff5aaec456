import type { Theme } from "../storage/theme";
import { usePage } from "./context";
import { MoonIcon, ScreenIcon, SunIcon } from "./icons";

const THEMES: { theme: Theme; label: string; Icon: typeof SunIcon }[] = [
  { theme: "system", label: "Theme of the system", Icon: ScreenIcon },
  { theme: "light", label: "Light theme", Icon: SunIcon },
  { theme: "dark", label: "Dark theme", Icon: MoonIcon },
];

export function ThemeSwitch() {
  const page = usePage();
  return (
    <fieldset class="theme-switch">
      <legend class="visually-hidden">Theme</legend>
      {THEMES.map(({ theme, label, Icon }) => (
        <label key={theme} title={label}>
          <input
            type="radio"
            name="theme"
            class="visually-hidden"
            aria-label={label}
            data-testid={`theme-${theme}`}
            checked={page.theme.value === theme}
            onChange={() => (page.theme.value = theme)}
          />
          <Icon />
        </label>
      ))}
    </fieldset>
  );
}
