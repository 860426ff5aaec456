/** A random id of 16 hex digits, made without crypto.randomUUID, which is missing on pages served over plain HTTP. */
export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
