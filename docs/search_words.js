// The search takes every word for a beginning, "a" for all that begins with it. So a question's small words are left out before it is asked.
const SMALL = new Set(
  ("a an and are as at be by can could did do does for from had has have how i if in into is it its me my of on one or our should so some that " +
    "the their them then there these this to up us was we were what when where which who why will with would you your").split(" "),
);
const asked = (text) => {
  const words = text.replace(/['\u2019]s\b/g, "").replace(/[?!,]/g, " ").split(/\s+/).filter(Boolean);
  const large = words.filter((word) => !SMALL.has(word.toLowerCase()));
  return (large.length ? large : words).join(" ");
};
const send = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  const question = message && message.type === 2 && typeof message.data === "string";
  return send.call(this, question ? { ...message, data: asked(message.data) } : message, ...rest);
};
