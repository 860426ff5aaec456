import type { Channel, Locks } from "../src/storage/tabs";

/** The storage as one tab sees it: its own changes at once, and other tabs' changes when they are delivered. */
export class TabStorage implements Storage {
  [key: string]: unknown;

  constructor(entries: Record<string, string>, write: (key: string, value: string | null) => void) {
    Object.assign(this, entries);
    Object.defineProperty(this, "write", { value: write });
  }

  get length(): number {
    return Object.keys(this).length;
  }

  key(index: number): string | null {
    return Object.keys(this)[index] ?? null;
  }

  getItem(key: string): string | null {
    return Object.hasOwn(this, key) ? (this[key] as string) : null;
  }

  setItem(key: string, value: string): void {
    if (this.getItem(key) === value) return;
    this[key] = value;
    (this.write as (key: string, value: string | null) => void)(key, value);
  }

  removeItem(key: string): void {
    if (this.getItem(key) === null) return;
    delete this[key];
    (this.write as (key: string, value: string | null) => void)(key, null);
  }

  clear(): void {
    for (const key of Object.keys(this)) this.removeItem(key);
  }
}

interface Write {
  from: BrowserTab;
  key: string;
  value: string | null;
}

/** A tab of a `TestBrowser`. Whatever the code of a closed tab still does, no other tab learns of it. */
export class BrowserTab {
  readonly storage: TabStorage;
  readonly window = new EventTarget();
  /** Whether the tab replies to no message, for example because it computes. */
  busy = false;
  readonly locks: Locks | null;
  readonly channel: Channel = {
    onmessage: null,
    postMessage: (message) => {
      if (!this.browser.tabs.includes(this)) return;
      for (const other of this.browser.tabs) {
        if (other !== this && !other.busy)
          other.channel.onmessage?.call(other.channel, { data: message } as MessageEvent);
      }
    },
  };
  private seen: number;

  constructor(private readonly browser: TestBrowser) {
    this.storage = new TabStorage(browser.disk(), (key, value) => {
      if (browser.tabs.includes(this)) browser.log.push({ from: this, key, value });
    });
    this.seen = browser.log.length;
    this.locks = browser.hasLocks
      ? {
          request: async (name, hold) => {
            browser.locks.set(name, this);
            await hold();
            browser.locks.delete(name);
          },
          query: () => Promise.resolve({ held: [...browser.locks.keys()].map((name) => ({ name })) }),
        }
      : null;
  }

  /** Lets the tab see the next changes of other tabs, with their storage events. */
  deliver(most = Infinity): void {
    for (; most > 0 && this.seen < this.browser.log.length; this.seen += 1) {
      const { from, key, value } = this.browser.log[this.seen]!;
      if (from === this) continue;
      most -= 1;
      const own = this.browser.log.slice(this.seen).some((later) => later.from === this && later.key === key);
      if (!own) {
        if (value === null) delete this.storage[key];
        else this.storage[key] = value;
      }
      const event = Object.assign(new Event("storage"), { storageArea: this.storage, key, newValue: value });
      this.window.dispatchEvent(event);
    }
  }
}

/**
 * Several tabs with one storage. As in a browser with a process for each tab, a tab learns of other tabs' changes late,
 * and a later change of an entry replaces an earlier change.
 */
export class TestBrowser {
  readonly log: Write[] = [];
  readonly tabs: BrowserTab[] = [];
  /** The held locks, each with the tab that holds it. */
  readonly locks = new Map<string, BrowserTab>();

  /** Without `hasLocks`, the browser is one whose page has no secure connection. */
  constructor(readonly hasLocks = true) {}

  open(): BrowserTab {
    const tab = new BrowserTab(this);
    this.tabs.push(tab);
    return tab;
  }

  close(tab: BrowserTab): void {
    this.tabs.splice(this.tabs.indexOf(tab), 1);
    for (const [name, owner] of this.locks) if (owner === tab) this.locks.delete(name);
  }

  disk(): Record<string, string> {
    const entries: Record<string, string> = {};
    for (const { key, value } of this.log) {
      if (value === null) delete entries[key];
      else entries[key] = value;
    }
    return entries;
  }

  /** Delivers all changes, and the changes that tabs make in reply. Throws if the tabs do not stop replying. */
  deliverAll(): void {
    for (let rounds = 0; rounds < 100; rounds += 1) {
      const before = this.log.length;
      for (const tab of this.tabs) tab.deliver();
      if (this.log.length === before) return;
    }
    throw new Error("the tabs answer each other for ever");
  }
}
