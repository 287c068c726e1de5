// Splits UTF-8 text, given in pieces, into tokens: words and numbers in lower case, each Han
// character and each punctuation mark on its own.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace lmengine::corpus {

enum class Kind : uint8_t { ignored, space, letter, digit, symbol, han };

// Kind and lower-case form of the code points of the first two planes; filled from Python's
// unicodedata when the module is loaded.
struct CharacterTable {
  static constexpr char32_t size = 0x20000;
  std::vector<Kind> kinds;
  std::vector<char32_t> lower;

  Kind kind(char32_t c) const {
    if (c < size) return kinds[c];
    return c <= 0x323af ? Kind::han : Kind::symbol;
  }
  char32_t lower_case(char32_t c) const { return c < size ? lower[c] : c; }
};

// Where a break between texts lies, besides at the end of a file: after every line, after an empty
// line, or nowhere.
enum class Breaks { line, paragraph, file };

inline void append_utf8(std::string& to, char32_t c) {
  if (c < 0x80) {
    to += static_cast<char>(c);
  } else if (c < 0x800) {
    to += static_cast<char>(0xc0 | c >> 6);
    to += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    to += static_cast<char>(0xe0 | c >> 12);
    to += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    to += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    to += static_cast<char>(0xf0 | c >> 18);
    to += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    to += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    to += static_cast<char>(0x80 | (c & 0x3f));
  }
}

// Reads one code point from [at, end): returns its length, 0 if the bytes end within it, or minus
// the number of bytes to skip if they are not UTF-8.
inline int decode_utf8(const unsigned char* at, const unsigned char* end, char32_t& c) {
  const unsigned char lead = *at;
  if (lead < 0x80) {
    c = lead;
    return 1;
  }
  const int length = lead >= 0xc2 && lead < 0xe0   ? 2
                     : lead >= 0xe0 && lead < 0xf0 ? 3
                     : lead >= 0xf0 && lead < 0xf5 ? 4
                                                   : 0;
  if (length == 0) return -1;
  c = lead & (0x7f >> length);
  for (int i = 1; i < length; ++i) {
    if (at + i == end) return 0;
    unsigned char low = 0x80, high = 0xbf;  // the second byte excludes long forms and surrogates
    if (i == 1 && lead == 0xe0) low = 0xa0;
    if (i == 1 && lead == 0xed) high = 0x9f;
    if (i == 1 && lead == 0xf0) low = 0x90;
    if (i == 1 && lead == 0xf4) high = 0x8f;
    if (at[i] < low || at[i] > high) return -i;
    c = c << 6 | (at[i] & 0x3f);
  }
  return length;
}

// Sink has token(std::string_view) and text_break().
template <class Sink>
class Tokeniser {
 public:
  Tokeniser(const CharacterTable& table, Sink& sink, Breaks breaks, bool replace_errors)
      : table_(table), sink_(sink), breaks_(breaks), replace_errors_(replace_errors) {}

  // Takes the next bytes of a file; a character cut off at their end waits for the next call.
  void feed(std::string_view bytes, const std::string& name) {
    if (!rest_.empty()) {
      rest_ += bytes;
      const std::string joined = std::move(rest_);
      rest_.clear();
      run(joined, name);
    } else {
      run(bytes, name);
    }
  }

  void end_of_file(const std::string& name) {
    if (!rest_.empty()) {
      if (!replace_errors_) invalid(name, offset_);
      take(0xfffd);
      rest_.clear();
    }
    finish_token();
    sink_.text_break();
    offset_ = 0;
    newlines_ = 0;
  }

 private:
  void run(std::string_view bytes, const std::string& name) {
    const auto* begin = reinterpret_cast<const unsigned char*>(bytes.data());
    const auto* end = begin + bytes.size();
    const auto* at = begin;
    while (at < end) {
      char32_t c;
      const int length = decode_utf8(at, end, c);
      if (length == 0) {
        rest_.assign(reinterpret_cast<const char*>(at), end - at);
        break;
      }
      if (length < 0) {
        if (!replace_errors_) invalid(name, offset_ + (at - begin));
        take(0xfffd);
        at -= length;
        continue;
      }
      take(c);
      at += length;
    }
    offset_ += at - begin;
  }

  [[noreturn]] static void invalid(const std::string& name, int64_t offset) {
    throw std::invalid_argument(name + ": not UTF-8 at byte " + std::to_string(offset));
  }

  void take(char32_t c) {
    const Kind kind = table_.kind(c);
    if (kind == Kind::ignored) return;
    if (kind == Kind::letter || kind == Kind::digit) {
      if (joint_ != 0) {
        // an apostrophe between letters, or a point or comma between digits, belongs to the word
        if (joins(kind)) {
          append_utf8(word_, joint_);
          joint_ = 0;
        } else {
          finish_token();
        }
      }
      number_ = kind == Kind::digit && (word_.empty() || number_);
      append_utf8(word_, table_.lower_case(c));
      newlines_ = 0;
      return;
    }
    if (kind == Kind::symbol && joint_ == 0 && !word_.empty()) {
      const bool apostrophe = c == '\'' || c == 0x2019;
      if (number_ ? c == '.' || c == ',' : apostrophe) {
        joint_ = apostrophe ? U'\'' : c;
        return;
      }
    }
    finish_token();
    if (kind == Kind::space) {
      if (c == '\n') new_line();
      return;
    }
    newlines_ = 0;
    append_utf8(word_, c);
    finish_token();
  }

  bool joins(Kind kind) const { return joint_ == '\'' ? !number_ : kind == Kind::digit; }

  void new_line() {
    ++newlines_;
    if (breaks_ == Breaks::line || (breaks_ == Breaks::paragraph && newlines_ == 2))
      sink_.text_break();
  }

  void finish_token() {
    if (!word_.empty()) {
      sink_.token(word_);
      word_.clear();
    }
    if (joint_ != 0) {
      append_utf8(word_, joint_);
      joint_ = 0;
      sink_.token(word_);
      word_.clear();
    }
    number_ = false;
  }

  const CharacterTable& table_;
  Sink& sink_;
  Breaks breaks_;
  bool replace_errors_;
  std::string rest_;     // the bytes of a character that is not complete
  std::string word_;     // the word or number being read, in lower case
  char32_t joint_ = 0;   // a mark after word_ that belongs to it if the word goes on
  bool number_ = false;  // word_ has digits only
  int newlines_ = 0;     // since the last token
  int64_t offset_ = 0;   // of the next byte to read
};

}  // namespace lmengine::corpus
