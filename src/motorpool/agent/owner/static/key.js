// The owner's key. It is made in this browser, cannot be taken out of it, and signs what the car is allowed to do.
const DOMAIN = "motorpool consent v1\n";
export const DATA_CLASSES = ["availability", "energy", "region"];

export function canSign() {
  return Boolean(globalThis.isSecureContext && crypto.subtle && globalThis.indexedDB);
}

function store(mode, work) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("owner", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("keys");
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const done = opening.result.transaction("keys", mode);
      const request = work(done.objectStore("keys"));
      done.oncomplete = () => { opening.result.close(); resolve(request.result); };
      done.onabort = done.onerror = () => { opening.result.close(); reject(done.error); };
    };
  });
}

export async function loadKey() {
  if (!canSign()) return null;
  return (await store("readonly", (keys) => keys.get("owner"))) ?? null;
}

export async function makeKey() {
  const pair = await crypto.subtle.generateKey({ name: "Ed25519" }, false, ["sign", "verify"]);
  await store("readwrite", (keys) => keys.put(pair, "owner"));
  if (navigator.storage?.persist) await navigator.storage.persist(); // so that the browser does not clear it away
  return pair;
}

function base64(bytes) {
  return btoa(String.fromCharCode(...new Uint8Array(bytes)));
}

export async function publicOf(pair) {
  return base64(await crypto.subtle.exportKey("raw", pair.publicKey));
}

export async function signGrant(pair, papers, limits, expiresMs) {
  const paper = JSON.stringify({
    type: "grant",
    vehicle_id: papers.vehicle_id,
    purposes: ["compute"],
    data_classes: DATA_CLASSES,
    limits,
    granted_ms: papers.next_grant_ms, // by the car's clock, so that a phone that is fast or slow does no harm
    expires_ms: expiresMs,
  });
  const signature = await crypto.subtle.sign({ name: "Ed25519" }, pair.privateKey, new TextEncoder().encode(DOMAIN + paper));
  return JSON.stringify({ document: paper, signature: base64(signature) });
}
