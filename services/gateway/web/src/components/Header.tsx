import { IconButton } from "./IconButton";
import { usePage } from "./context";
import { PlusIcon, ReportIcon, SettingsIcon, SidebarIcon, TeachIcon } from "./icons";

export function Header() {
  const { app, layout, lessons } = usePage();
  const open = layout.sidebarOpen.value;
  return (
    <header class="header">
      {(!open || layout.narrow.value) && (
        <>
          <IconButton
            label="Show the list"
            data-testid="sidebar-toggle"
            aria-controls="sidebar"
            aria-expanded={open}
            onClick={() => layout.toggleSidebar()}
          >
            <SidebarIcon />
          </IconButton>
          <IconButton label="New chat" onClick={() => app.newChat()}>
            <PlusIcon />
          </IconButton>
        </>
      )}
      <h1>{app.active.value?.title.value ?? <span class="visually-hidden">New chat</span>}</h1>
      <ModelChoice />
      <a
        class="icon-button"
        href="report"
        target="_blank"
        rel="noopener"
        aria-label="Report on the model"
        title="Report on the model"
        data-testid="report-link"
      >
        <ReportIcon />
      </a>
      {lessons.offered.value && (
        <IconButton label="Teach" data-testid="teach-toggle" onClick={() => lessons.show()}>
          <TeachIcon />
        </IconButton>
      )}
      <IconButton label="Settings" data-testid="settings-toggle" onClick={() => (app.settingsOpen.value = true)}>
        <SettingsIcon />
      </IconButton>
    </header>
  );
}

/** Shows the model that answers; if there are several models, a menu to choose it. */
function ModelChoice() {
  const { app } = usePage();
  const models = app.models.value;
  if (models.length < 2) return <span class="model">{app.model.value}</span>;
  return (
    <select
      class="model"
      aria-label="Model"
      data-testid="model"
      value={app.model.value}
      onChange={(event) => (app.settings.value = { ...app.settings.value, model: event.currentTarget.value })}
    >
      {models.map(({ id }) => (
        <option key={id} value={id}>
          {id}
        </option>
      ))}
    </select>
  );
}
