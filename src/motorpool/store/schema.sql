-- Times are milliseconds since 1970 (UTC), money is millionths of the currency unit, keys of lines are batch_no << 32 | line.

CREATE TABLE api_key (
  key_id TEXT PRIMARY KEY,
  account TEXT NOT NULL,
  name TEXT NOT NULL,
  hash BLOB NOT NULL UNIQUE,            -- SHA-256 of the whole key; a key is 256 random bits, so no salt is needed
  hint TEXT NOT NULL,                   -- its last four characters, for people
  created_ms INTEGER NOT NULL,
  revoked_ms INTEGER
) STRICT;

CREATE TABLE file (
  file_id TEXT PRIMARY KEY,
  account TEXT NOT NULL,
  purpose TEXT NOT NULL,
  filename TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  blob TEXT NOT NULL,                   -- name in the object store
  created_ms INTEGER NOT NULL,
  expires_ms INTEGER,
  deleted_ms INTEGER
) STRICT;
CREATE INDEX file_by_account ON file (account, created_ms, file_id) WHERE deleted_ms IS NULL;
CREATE INDEX file_by_expiry ON file (expires_ms) WHERE deleted_ms IS NULL AND expires_ms IS NOT NULL;

CREATE TABLE batch (
  batch_no INTEGER PRIMARY KEY,
  batch_id TEXT NOT NULL UNIQUE,
  account TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  input_file_id TEXT NOT NULL,
  completion_window TEXT NOT NULL,
  status TEXT NOT NULL,
  model TEXT,
  input_micro INTEGER,                  -- the price when it began: millionths for a million tokens
  output_micro INTEGER,
  owner_share_bp INTEGER,               -- the owners' part, in hundredths of a percent
  metadata TEXT,                        -- JSON object or NULL
  output_expires_s INTEGER,
  errors TEXT,                          -- JSON array of {code, message, param, line} or NULL
  output_file_id TEXT,
  error_file_id TEXT,
  total INTEGER NOT NULL DEFAULT 0,
  completed INTEGER NOT NULL DEFAULT 0,
  failed INTEGER NOT NULL DEFAULT 0,
  prompt_tokens INTEGER NOT NULL DEFAULT 0,
  cached_tokens INTEGER NOT NULL DEFAULT 0,
  completion_tokens INTEGER NOT NULL DEFAULT 0,
  carried_tokens INTEGER NOT NULL DEFAULT 0,
  cost_micro INTEGER NOT NULL DEFAULT 0,
  created_ms INTEGER NOT NULL,
  expires_ms INTEGER NOT NULL,
  in_progress_ms INTEGER,
  finalizing_ms INTEGER,
  completed_ms INTEGER,
  failed_ms INTEGER,
  expired_ms INTEGER,
  cancelling_ms INTEGER,
  cancelled_ms INTEGER
) STRICT;
CREATE INDEX batch_by_account ON batch (account, created_ms, batch_id);
CREATE INDEX batch_open ON batch (status) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- Where each line of a valid input file begins, how long it is, and how many tokens its answer may have at most:
-- little-endian uint64, uint32 and uint32 arrays.
CREATE TABLE line_index (
  batch_no INTEGER PRIMARY KEY REFERENCES batch,
  offsets BLOB NOT NULL,
  lengths BLOB NOT NULL,
  limits BLOB NOT NULL
) STRICT;

-- One row for a finished line, ever: the primary key is what makes a result count once.
CREATE TABLE result (
  line_key INTEGER PRIMARY KEY,
  status INTEGER NOT NULL,              -- HTTP status of the answer; 0: never ran, `body` is {"code", "message"}
  body BLOB NOT NULL,
  vehicle_id TEXT,
  prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL,
  carried_tokens INTEGER NOT NULL,
  cost_micro INTEGER NOT NULL
) STRICT;

-- The newest checkpoint of a line that is not finished, and which vehicles generated how many of its tokens.
CREATE TABLE checkpoint (
  line_key INTEGER PRIMARY KEY,
  tokens INTEGER NOT NULL,
  data BLOB NOT NULL,
  shares TEXT NOT NULL                  -- JSON: [[vehicle_id, tokens], ...]
) STRICT;

CREATE TABLE lease (
  lease_id TEXT PRIMARY KEY,
  batch_no INTEGER NOT NULL,
  vehicle_id TEXT NOT NULL,
  incarnation TEXT NOT NULL,
  granted_ms INTEGER NOT NULL,
  expires_ms INTEGER NOT NULL,
  lines BLOB NOT NULL,                  -- little-endian uint32 array
  carried TEXT NOT NULL                 -- JSON: {line: [[vehicle_id, tokens], ...]} for lines granted with a checkpoint
) STRICT;

-- Vehicles that a line was taken from before it had ended: they may have finished it all the same.
CREATE TABLE held (
  line_key INTEGER NOT NULL,
  vehicle_id TEXT NOT NULL,
  PRIMARY KEY (line_key, vehicle_id)
) STRICT, WITHOUT ROWID;

-- Double entry: every row moves an amount from one account to another, so all accounts together are always zero.
CREATE TABLE transfer (
  transfer_id TEXT PRIMARY KEY,
  kind TEXT NOT NULL,
  debit TEXT NOT NULL,
  credit TEXT NOT NULL,
  amount_micro INTEGER NOT NULL CHECK (amount_micro > 0),
  reference TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  CHECK (debit <> credit)
) STRICT;
CREATE INDEX transfer_by_debit ON transfer (debit);
CREATE INDEX transfer_by_credit ON transfer (credit);
CREATE TRIGGER transfer_is_final_u BEFORE UPDATE ON transfer BEGIN SELECT RAISE(ABORT, 'transfers are immutable'); END;
CREATE TRIGGER transfer_is_final_d BEFORE DELETE ON transfer BEGIN SELECT RAISE(ABORT, 'transfers are immutable'); END;

CREATE TABLE vehicle (
  vehicle_id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  owner_key TEXT NOT NULL DEFAULT '',   -- the owner's public key
  enrolled_ms INTEGER NOT NULL,
  revoked_ms INTEGER,
  lines_done INTEGER NOT NULL DEFAULT 0,
  tokens_generated INTEGER NOT NULL DEFAULT 0,
  tokens_handed_on INTEGER NOT NULL DEFAULT 0,
  tokens_taken_over INTEGER NOT NULL DEFAULT 0,
  energy_mwh INTEGER NOT NULL DEFAULT 0,
  earned_micro INTEGER NOT NULL DEFAULT 0 -- what its owner's account has received: the sum of the transfers to it
) STRICT;

CREATE TABLE story (
  n INTEGER PRIMARY KEY,
  subject TEXT NOT NULL,                -- a vehicle_id or batch_id
  at_ms INTEGER NOT NULL,
  cause_id TEXT NOT NULL,
  what TEXT NOT NULL
) STRICT;
CREATE INDEX story_by_subject ON story (subject, n);

CREATE TABLE meta (
  name TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT;
