// A query's words; 1.92 is one of them, as in the index. The number of a theorem is
// written when all pages are read, so the index has none: it only chooses the chapter.
const NUMBERED = /\b(algorithm|chapter|eq|equation|exercise|fig|figure|lemma|table|theorem)(\.?\s+)(\d+)(\.\d+)*/giu;
var splitQuery = (query) =>
  query
    .replace(NUMBERED, "$1 ")
    .match(/\d+(?:\.\d+)+|[\p{Letter}\p{Number}_\p{Emoji_Presentation}]+/gu) ?? [];
