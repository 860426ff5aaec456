import { computed, signal, type ReadonlySignal } from "@preact/signals";
import type { Api } from "../api/api";
import { ApiError } from "../api/errors";
import { newId } from "../chat/id";
import { isDone, withOlder, type Fact, type LessonDetails, type LessonList, type NewLesson } from "./lesson";

const CHECK_MS = 1_000;

/** The lessons of the served model, and the person's actions on them. Only callers who may teach see any of this. */
export class Lessons {
  readonly open = signal(false);
  /** The questions and answers that the person writes. */
  readonly facts = signal<readonly Fact[]>([{ question: "", answer: "" }]);
  /** Null until the server has said that this caller may teach. */
  readonly list = signal<LessonList | null>(null);
  readonly problem = signal("");
  readonly offered: ReadonlySignal<boolean> = computed(() => this.list.value !== null);
  /** The last lesson that was sent and that the server has not confirmed, with its `Idempotency-Key`. */
  private sent = { content: "", key: "" };
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(
    private readonly api: Api,
    private readonly options: { hasKey: () => boolean; onServed: () => void; hidden?: () => boolean },
  ) {}

  /**
   * Requests the lessons now, and again every second while the dialog is open, a lesson is not done, or a requested roll
   * back is not done. While the page is hidden, no request begins by itself. Without an API key, nothing is requested,
   * because only callers with a key may teach.
   */
  async check(): Promise<void> {
    clearTimeout(this.timer);
    const before = this.list.peek();
    try {
      const found = this.options.hasKey() ? await this.newest() : null;
      this.list.value = found && withOlder(found, this.list.peek());
    } catch (error) {
      // 401, 403: the key may not teach. 404: the server accepts no lessons. After other failures, the old list stays.
      if (error instanceof ApiError && [401, 403, 404].includes(error.status ?? 0)) this.list.value = null;
    }
    const list = this.list.peek();
    if (list && before && list.revision !== before.revision) this.options.onServed();
    clearTimeout(this.timer);
    if (!list) return;
    const working = list.roll_back?.state === "requested" || list.data.some((lesson) => !isDone(lesson));
    if (!working && !this.open.peek()) return;
    this.timer = setTimeout(() => {
      if (!this.options.hidden?.()) void this.check();
    }, CHECK_MS);
  }

  show(): void {
    this.open.value = true;
    void this.check();
  }

  /** Opens the dialog with a question to which the person wants another answer. */
  correct(question: string, answer: string): void {
    const written = this.facts.peek().filter((fact) => fact.question || fact.answer);
    this.facts.value = [...written, { question, answer }];
    this.show();
  }

  /** Sends a lesson. A retry has the same `Idempotency-Key`, because the server may have added the lesson already. */
  async teach(lesson: NewLesson): Promise<boolean> {
    const content = JSON.stringify(lesson);
    if (content !== this.sent.content) this.sent = { content, key: newId() };
    const { key } = this.sent;
    const taken = await this.act(() => this.api.teach(lesson, key));
    if (taken) this.sent = { content: "", key: "" };
    return taken;
  }

  async teachFacts(): Promise<void> {
    const items = this.facts.peek().filter(({ question, answer }) => question.trim() || answer.trim());
    if (items.length === 0) this.problem.value = "Write a question and its answer first.";
    else if (await this.teach({ items })) this.facts.value = [{ question: "", answer: "" }];
  }

  cancel(number: number): Promise<boolean> {
    return this.act(() => this.api.changeLesson(number, "cancel"));
  }

  rollBack(number: number): Promise<boolean> {
    return this.act(() => this.api.changeLesson(number, "roll_back"));
  }

  /** Adds the next older lessons to the list. */
  async showOlder(): Promise<void> {
    const last = this.list.peek()?.data.at(-1);
    if (!last) return;
    this.problem.value = "";
    try {
      const { data, has_more } = await this.api.lessons(last.number);
      const list = this.list.peek();
      // The older lessons are added only if the list still ends with the same lesson, because a check may have replaced
      // the list meanwhile.
      if (list?.data.at(-1)?.number === last.number)
        this.list.value = { ...list, data: [...list.data, ...data], has_more };
    } catch (error) {
      this.problem.value = error instanceof Error ? error.message : String(error);
    }
  }

  /** A lesson with the reasons of the decision; null if the request fails. */
  async details(number: number): Promise<LessonDetails | null> {
    try {
      return await this.api.lesson(number);
    } catch (error) {
      this.problem.value = error instanceof Error ? error.message : String(error);
      return null;
    }
  }

  /** Requests the newest lessons, and then older lessons until the list has every shown lesson that was not done. */
  private async newest(): Promise<LessonList> {
    let list = await this.api.lessons();
    const known = this.list.peek();
    const undone = known?.model === list.model ? known.data.findLast((lesson) => !isDone(lesson))?.number : undefined;
    let last = list.data.at(-1);
    while (last && undone !== undefined && list.has_more && last.number > undone) {
      const { data, has_more } = await this.api.lessons(last.number);
      list = { ...list, data: [...list.data, ...data], has_more };
      last = data.at(-1);
    }
    return list;
  }

  private async act(request: () => Promise<unknown>): Promise<boolean> {
    this.problem.value = "";
    try {
      await request();
    } catch (error) {
      this.problem.value = error instanceof Error ? error.message : String(error);
      return false;
    }
    await this.check();
    return true;
  }
}
