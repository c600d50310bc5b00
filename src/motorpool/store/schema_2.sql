-- Version 2: the energy and CO2 of every answer, statements by day, and what owners say by the cell.
-- Energy is micro-watt-hours (uwh) of the whole vehicle, CO2 micrograms (ug).

ALTER TABLE result ADD COLUMN energy_uwh INTEGER NOT NULL DEFAULT 0;
ALTER TABLE result ADD COLUMN energy_is_measured INTEGER NOT NULL DEFAULT 0;  -- 0: the vehicle modelled it
ALTER TABLE result ADD COLUMN co2_ug INTEGER NOT NULL DEFAULT 0;

ALTER TABLE batch ADD COLUMN energy_uwh INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batch ADD COLUMN measured_uwh INTEGER NOT NULL DEFAULT 0;         -- the part of it that was measured
ALTER TABLE batch ADD COLUMN co2_ug INTEGER NOT NULL DEFAULT 0;

ALTER TABLE vehicle ADD COLUMN energy_uwh INTEGER NOT NULL DEFAULT 0;         -- booked for answers that counted
ALTER TABLE vehicle ADD COLUMN co2_ug INTEGER NOT NULL DEFAULT 0;
ALTER TABLE vehicle ADD COLUMN region TEXT NOT NULL DEFAULT '';
ALTER TABLE vehicle ADD COLUMN withdrawn_ms INTEGER;                          -- the date of the owner's withdrawal, while it holds
ALTER TABLE vehicle ADD COLUMN withdrawal_seen INTEGER NOT NULL DEFAULT 0;    -- the vehicle itself has said that it knows
ALTER TABLE vehicle ADD COLUMN paused_until_ms INTEGER NOT NULL DEFAULT 0;
UPDATE vehicle SET energy_uwh = energy_mwh * 1000;
ALTER TABLE vehicle DROP COLUMN energy_mwh;

-- What each vehicle did on each day (days since 1970, UTC): the owner's statement.
CREATE TABLE vehicle_day (
  vehicle_id TEXT NOT NULL,
  day INTEGER NOT NULL,
  earned_micro INTEGER NOT NULL DEFAULT 0,
  lines_done INTEGER NOT NULL DEFAULT 0,
  tokens_generated INTEGER NOT NULL DEFAULT 0,
  energy_uwh INTEGER NOT NULL DEFAULT 0,
  co2_ug INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (vehicle_id, day)
) STRICT, WITHOUT ROWID;

-- The last word of an owner of each kind, until the vehicle has heard it and after: it is sent whenever the vehicle comes back.
CREATE TABLE owner_word (
  vehicle_id TEXT NOT NULL,
  kind TEXT NOT NULL,                   -- consent, resume, pause or need_car
  dated_ms INTEGER NOT NULL,
  until_ms INTEGER,                     -- of a pause
  document BLOB,                        -- as the owner signed it; NULL for what needs no signature
  PRIMARY KEY (vehicle_id, kind)
) STRICT, WITHOUT ROWID;

-- Codes by which an owner's device registers its key, once each; only their SHA-256 is kept.
CREATE TABLE owner_code (
  hash BLOB PRIMARY KEY,
  vehicle_id TEXT NOT NULL,
  expires_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
