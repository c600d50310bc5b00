-- Version 5: what customers ask of a batch, what operators set for vehicles, sites and customers, and what the cell has learnt.

-- A batch without a row asks for nothing.
CREATE TABLE batch_terms (
  batch_no INTEGER PRIMARY KEY REFERENCES batch ON DELETE CASCADE,
  regions TEXT NOT NULL DEFAULT '[]',   -- JSON array of region codes; empty: anywhere
  min_trust INTEGER NOT NULL DEFAULT 0,
  best_effort INTEGER NOT NULL DEFAULT 0,
  promised_ms INTEGER,                  -- by when the cell has said that it will be done
  quote_known INTEGER                   -- 0: admitted without history, so nothing stands behind the promise
) STRICT;

ALTER TABLE vehicle ADD COLUMN site TEXT NOT NULL DEFAULT '';        -- a car park, say; '': none
ALTER TABLE vehicle ADD COLUMN trust INTEGER NOT NULL DEFAULT 0;     -- tier, 0 to 3
ALTER TABLE vehicle ADD COLUMN reserve INTEGER NOT NULL DEFAULT 0;   -- 1: it works only on what would be late

CREATE TABLE site (
  name TEXT PRIMARY KEY,
  limit_w INTEGER NOT NULL CHECK (limit_w >= 0),                     -- 0: no limit
  limit_vehicles INTEGER NOT NULL CHECK (limit_vehicles >= 0)
) STRICT, WITHOUT ROWID;

-- A customer without a row has the share 1.
CREATE TABLE customer (
  account TEXT PRIMARY KEY,
  weight_milli INTEGER NOT NULL CHECK (weight_milli > 0) -- thousandths
) STRICT, WITHOUT ROWID;

-- What the cell has learnt of its fleet, so that a restart does not forget it. No vehicle is in it.
CREATE TABLE learnt (
  name TEXT PRIMARY KEY,
  data BLOB NOT NULL,
  at_ms INTEGER NOT NULL
) STRICT;
