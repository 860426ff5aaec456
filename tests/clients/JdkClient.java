// The HTTP client of the JDK with its defaults: it offers HTTP/2 with `Upgrade: h2c` in its first request.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class JdkClient {
    static final String HI = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]";

    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest.Builder request =
            HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/chat/completions")).header("Content-Type", "application/json");
        HttpResponse<String> first = client.send(request.POST(text(HI + "}")).build(), HttpResponse.BodyHandlers.ofString());
        HttpResponse<String> again = client.send(request.POST(text(HI + "}")).build(), HttpResponse.BodyHandlers.ofString());
        String streamed = HI + ", \"stream\": true}";
        long events = client.send(request.POST(text(streamed)).build(), HttpResponse.BodyHandlers.ofLines())
            .body().filter(line -> line.startsWith("data: ")).count();
        System.out.printf(
            "{\"statuses\": [%d, %d], \"whole\": %s, \"events\": %d}%n",
            first.statusCode(), again.statusCode(), first.body(), events);
    }

    static HttpRequest.BodyPublisher text(String body) {
        return HttpRequest.BodyPublishers.ofString(body);
    }
}
