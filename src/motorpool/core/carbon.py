"""Grams of CO2 for a kilowatt-hour, by country.

Decides: which number stands for a region code. Must not: guess a region; one that is not in the table has the default.
Called by: the control plane, which shows grams beside tokens, and the owner's statement.

Grams of CO2 equivalents for a kilowatt-hour that a country generates, on average over the year that stands beside it.
Source: the field ``carbon_intensity`` of ``data/private_infra/global_energy_mix.json`` in the package codecarbon 3.3.2,
rounded; countries that generate 2 TWh a year or more. MIT licence, copyright (c) 2019 Mila, BCG Gamma, CometML,
Haverford College, (c) 2023 Code Carbon NGO. What a country imports, and the hour of the day, are not in it.
"""

from __future__ import annotations

from typing import Final

DEFAULT_G_KWH: Final = 480  # the mean of the source's countries, weighted by what each generates
GRAMS_PER_KWH: Final[dict[str, int]] = {
    "AE": 561,  # United Arab Emirates, 2022
    "AL": 24,  # Albania, 2022
    "AM": 265,  # Armenia, 2022
    "AO": 175,  # Angola, 2022
    "AR": 354,  # Argentina, 2023
    "AT": 111,  # Austria, 2023
    "AU": 549,  # Australia, 2023
    "AZ": 671,  # Azerbaijan, 2022
    "BA": 600,  # Bosnia and Herzegovina, 2023
    "BD": 691,  # Bangladesh, 2023
    "BE": 138,  # Belgium, 2023
    "BG": 335,  # Bulgaria, 2023
    "BH": 905,  # Bahrain, 2022
    "BN": 894,  # Brunei, 2022
    "BO": 532,  # Bolivia, 2023
    "BR": 98,  # Brazil, 2023
    "BS": 660,  # Bahamas, 2022
    "BT": 23,  # Bhutan, 2022
    "BW": 848,  # Botswana, 2022
    "BY": 442,  # Belarus, 2022
    "CA": 170,  # Canada, 2023
    "CD": 24,  # Democratic Republic of Congo, 2022
    "CG": 700,  # Congo, 2022
    "CH": 35,  # Switzerland, 2023
    "CI": 394,  # Cote d'Ivoire, 2022
    "CL": 291,  # Chile, 2023
    "CM": 305,  # Cameroon, 2022
    "CN": 582,  # China, 2023
    "CO": 260,  # Colombia, 2023
    "CR": 53,  # Costa Rica, 2023
    "CU": 638,  # Cuba, 2022
    "CY": 534,  # Cyprus, 2023
    "CZ": 450,  # Czechia, 2023
    "DE": 381,  # Germany, 2023
    "DK": 152,  # Denmark, 2023
    "DO": 581,  # Dominican Republic, 2022
    "DZ": 635,  # Algeria, 2022
    "EC": 150,  # Ecuador, 2023
    "EE": 417,  # Estonia, 2023
    "EG": 570,  # Egypt, 2023
    "ES": 174,  # Spain, 2023
    "ET": 25,  # Ethiopia, 2022
    "FI": 79,  # Finland, 2023
    "FR": 56,  # France, 2023
    "GA": 492,  # Gabon, 2022
    "GB": 238,  # United Kingdom, 2023
    "GE": 168,  # Georgia, 2023
    "GH": 484,  # Ghana, 2022
    "GN": 237,  # Guinea, 2022
    "GR": 337,  # Greece, 2023
    "GT": 328,  # Guatemala, 2022
    "HK": 699,  # Hong Kong, 2022
    "HN": 282,  # Honduras, 2022
    "HR": 205,  # Croatia, 2023
    "HU": 204,  # Hungary, 2023
    "ID": 676,  # Indonesia, 2022
    "IE": 291,  # Ireland, 2023
    "IL": 583,  # Israel, 2022
    "IN": 713,  # India, 2023
    "IQ": 689,  # Iraq, 2022
    "IR": 655,  # Iran, 2023
    "IS": 28,  # Iceland, 2022
    "IT": 331,  # Italy, 2023
    "JM": 556,  # Jamaica, 2022
    "JO": 541,  # Jordan, 2022
    "JP": 485,  # Japan, 2023
    "KE": 70,  # Kenya, 2023
    "KG": 147,  # Kyrgyzstan, 2022
    "KH": 418,  # Cambodia, 2022
    "KP": 390,  # North Korea, 2022
    "KR": 431,  # South Korea, 2023
    "KW": 649,  # Kuwait, 2023
    "KZ": 821,  # Kazakhstan, 2023
    "LA": 266,  # Laos, 2022
    "LB": 599,  # Lebanon, 2022
    "LK": 510,  # Sri Lanka, 2022
    "LT": 160,  # Lithuania, 2023
    "LV": 123,  # Latvia, 2023
    "LY": 819,  # Libya, 2022
    "MA": 630,  # Morocco, 2023
    "MD": 643,  # Moldova, 2023
    "ME": 417,  # Montenegro, 2023
    "MG": 436,  # Madagascar, 2022
    "MK": 565,  # North Macedonia, 2023
    "ML": 408,  # Mali, 2022
    "MM": 399,  # Myanmar, 2023
    "MN": 775,  # Mongolia, 2023
    "MT": 459,  # Malta, 2023
    "MU": 632,  # Mauritius, 2022
    "MX": 507,  # Mexico, 2023
    "MY": 606,  # Malaysia, 2022
    "MZ": 136,  # Mozambique, 2022
    "NC": 661,  # New Caledonia, 2022
    "NG": 523,  # Nigeria, 2023
    "NI": 265,  # Nicaragua, 2022
    "NL": 268,  # Netherlands, 2023
    "NO": 30,  # Norway, 2023
    "NP": 24,  # Nepal, 2022
    "NZ": 113,  # New Zealand, 2023
    "OM": 565,  # Oman, 2023
    "PA": 162,  # Panama, 2022
    "PE": 266,  # Peru, 2023
    "PG": 507,  # Papua New Guinea, 2022
    "PH": 611,  # Philippines, 2023
    "PK": 441,  # Pakistan, 2023
    "PL": 662,  # Poland, 2023
    "PR": 679,  # Puerto Rico, 2022
    "PT": 166,  # Portugal, 2023
    "PY": 24,  # Paraguay, 2023
    "QA": 602,  # Qatar, 2023
    "RE": 573,  # Reunion, 2021
    "RO": 241,  # Romania, 2023
    "RS": 636,  # Serbia, 2023
    "RU": 441,  # Russia, 2023
    "SA": 707,  # Saudi Arabia, 2022
    "SD": 263,  # Sudan, 2022
    "SE": 41,  # Sweden, 2023
    "SG": 471,  # Singapore, 2023
    "SI": 231,  # Slovenia, 2023
    "SK": 117,  # Slovakia, 2023
    "SN": 512,  # Senegal, 2022
    "SR": 349,  # Suriname, 2022
    "SV": 271,  # El Salvador, 2023
    "SY": 702,  # Syria, 2022
    "TH": 550,  # Thailand, 2023
    "TJ": 117,  # Tajikistan, 2022
    "TM": 1306,  # Turkmenistan, 2022
    "TN": 564,  # Tunisia, 2023
    "TR": 465,  # Turkey, 2023
    "TT": 682,  # Trinidad and Tobago, 2022
    "TW": 642,  # Taiwan, 2023
    "TZ": 339,  # Tanzania, 2022
    "UA": 260,  # Ukraine, 2022
    "UG": 45,  # Uganda, 2022
    "US": 369,  # United States, 2023
    "UY": 129,  # Uruguay, 2023
    "UZ": 1168,  # Uzbekistan, 2022
    "VE": 186,  # Venezuela, 2022
    "VN": 475,  # Vietnam, 2023
    "YE": 566,  # Yemen, 2022
    "ZA": 708,  # South Africa, 2023
    "ZM": 112,  # Zambia, 2022
    "ZW": 298,  # Zimbabwe, 2022
}


def grams_per_kwh(region: str, default: int = DEFAULT_G_KWH) -> int:
    """The table's number for a region code: a country's two letters, alone or with a part of it (``US-CA``)."""
    return GRAMS_PER_KWH.get(region.split("-", 1)[0].upper(), default)


def micrograms(mwh: int, region: str, default: int = DEFAULT_G_KWH) -> int:
    """CO2 of so many milliwatt-hours at the socket, exactly: a gram a kilowatt-hour is a microgram a milliwatt-hour."""
    return mwh * grams_per_kwh(region, default)


def grams(mwh: int, region: str, default: int = DEFAULT_G_KWH) -> float:
    """The same in grams, for people."""
    return micrograms(mwh, region, default) / 1_000_000
