import type { Picture, ToolEvent } from "../api/wire";

/** The `data:` URL of a picture, for an `<img>`. Scripts in an SVG never run there. */
export function pictureUrl({ media_type, data }: Picture): string {
  return `data:${media_type};base64,${data}`;
}

/** The events without their pictures, which the model does not see and which can be large. */
export function withoutPictures(events: readonly ToolEvent[]): ToolEvent[] {
  return events.map((event) => {
    if (event.type === "call" || !event.pictures) return event;
    const { pictures: _, ...rest } = event;
    return rest;
  });
}
