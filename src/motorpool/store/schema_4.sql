-- Version 4: limits of keys, answers kept for idempotency keys, and webhooks.

-- What a key may ask of models in a minute; NULL: no limit. A key without a row has none.
CREATE TABLE key_limit (
  key_id TEXT PRIMARY KEY REFERENCES api_key ON DELETE CASCADE,
  requests_a_minute INTEGER CHECK (requests_a_minute > 0),
  tokens_a_minute INTEGER CHECK (tokens_a_minute > 0)
) STRICT, WITHOUT ROWID;

-- The answer to each POST that came with an Idempotency-Key, kept for a day. Headers and body are a customer's.
CREATE TABLE kept_answer (
  answer_no INTEGER PRIMARY KEY,
  account TEXT NOT NULL,
  name BLOB NOT NULL,                   -- SHA-256 of the key
  request BLOB NOT NULL,                -- SHA-256 of what was asked
  status INTEGER NOT NULL,
  headers TEXT NOT NULL,                -- JSON: [[name, value], ...]
  body BLOB NOT NULL,
  bytes INTEGER NOT NULL,               -- the space that it takes
  expires_ms INTEGER NOT NULL,
  UNIQUE (account, name)
) STRICT;
CREATE INDEX kept_answer_by_expiry ON kept_answer (expires_ms);
CREATE INDEX kept_answer_by_account ON kept_answer (account, answer_no, bytes);

-- Where a customer wants to hear of events. A secret has to be readable, as it signs what is sent.
CREATE TABLE webhook (
  webhook_id TEXT PRIMARY KEY,
  account TEXT NOT NULL,
  name TEXT NOT NULL,
  url TEXT NOT NULL,
  event_types TEXT NOT NULL,            -- JSON array
  secret BLOB NOT NULL,
  old_secret BLOB,                      -- signs as well, until old_until_ms
  old_until_ms INTEGER NOT NULL DEFAULT 0,
  created_ms INTEGER NOT NULL,
  updated_ms INTEGER NOT NULL,
  disabled_ms INTEGER,                  -- its server said that it is gone (410)
  deleted_ms INTEGER
) STRICT;
CREATE INDEX webhook_by_account ON webhook (account, created_ms) WHERE deleted_ms IS NULL;

-- What is to be told to whom: made in the transaction in which it happened, so that no crash loses one.
CREATE TABLE delivery (
  delivery_no INTEGER PRIMARY KEY,
  webhook_id TEXT NOT NULL REFERENCES webhook ON DELETE CASCADE,
  event_id TEXT NOT NULL,               -- the same for every webhook that hears of it
  type TEXT NOT NULL,
  subject TEXT NOT NULL,                -- the id of the batch or response
  happened_ms INTEGER NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending',-- pending, delivered or failed
  attempts INTEGER NOT NULL DEFAULT 0,
  next_ms INTEGER NOT NULL,             -- when to try (again)
  ended_ms INTEGER,
  outcome TEXT NOT NULL DEFAULT ''      -- of the last attempt: an HTTP status, or what went wrong; never what was said
) STRICT;
CREATE INDEX delivery_due ON delivery (next_ms) WHERE state = 'pending';
CREATE INDEX delivery_by_webhook ON delivery (webhook_id, delivery_no);
CREATE INDEX delivery_ended ON delivery (ended_ms) WHERE state <> 'pending';

CREATE TRIGGER batch_told AFTER UPDATE OF status ON batch
WHEN new.status IN ('completed', 'failed', 'expired', 'cancelled') AND new.status <> old.status BEGIN
  INSERT INTO delivery (webhook_id, event_id, type, subject, happened_ms, next_ms)
  SELECT webhook_id, 'evt_' || lower(hex(new.batch_id || '.' || new.status)), 'batch.' || new.status, new.batch_id,
    coalesce(new.completed_ms, new.failed_ms, new.expired_ms, new.cancelled_ms),
    coalesce(new.completed_ms, new.failed_ms, new.expired_ms, new.cancelled_ms)
  FROM webhook WHERE account = new.account AND deleted_ms IS NULL AND disabled_ms IS NULL
    AND EXISTS (SELECT 1 FROM json_each(event_types) WHERE value = 'batch.' || new.status);
END;

CREATE TRIGGER response_told AFTER UPDATE OF status ON response
WHEN new.background AND new.status IN ('completed', 'failed', 'incomplete', 'cancelled') AND new.status <> old.status BEGIN
  INSERT INTO delivery (webhook_id, event_id, type, subject, happened_ms, next_ms)
  SELECT webhook_id, 'evt_' || lower(hex(new.response_id || '.' || new.status)), 'response.' || new.status,
    new.response_id, coalesce(new.ended_ms, new.created_ms), coalesce(new.ended_ms, new.created_ms)
  FROM webhook WHERE account = new.account AND deleted_ms IS NULL AND disabled_ms IS NULL
    AND EXISTS (SELECT 1 FROM json_each(event_types) WHERE value = 'response.' || new.status);
END;
